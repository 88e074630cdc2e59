"""Ray Serve LLM's stock app, as its documentation starts it, until SIGINT: a side of benchmarks/endpoint.py.

    python endpoint_ray_llm.py PORT NAME FOLDER ENGINE_ARGUMENTS (JSON); says `ready` on stdout

Direct streaming is Ray's own switch (RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING and RAY_SERVE_ENABLE_HA_PROXY, see
endpoint_sides.py). Kind `cpu` and the bundle spare the GPU that it would ask for; `mlx` is what our platform's worker
takes. All else is Ray's default.
"""

import json
import os
import signal
import sys

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

CPUS = 8
"""For Ray's book-keeping alone."""
OBJECT_STORE_BYTES = 128 << 20


def main(port: int, name: str, folder: str, arguments: str) -> None:
    """See the module."""
    ray.init(
        address="local",
        num_cpus=CPUS,
        resources={"mlx": 1},
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=os.environ["RAY_TMPDIR"],
    )
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        config = LLMConfig(
            model_loading_config={"model_id": name, "model_source": folder},
            accelerator_config={"kind": "cpu"},
            placement_group_config={"bundles": [{"CPU": 1, "mlx": 1}]},
            engine_kwargs=json.loads(arguments),
        )
        serve.run(build_openai_app({"llm_configs": [config]}), name="llm")
        print("ready", flush=True)
        signal.sigwait([signal.SIGINT, signal.SIGTERM])
    finally:
        ray.shutdown()


if __name__ == "__main__":
    port, *words = sys.argv[1:]
    main(int(port), *words)
