"""Where Ray Serve LLM and vLLM are touched: a model plan becomes a running `ray.serve.llm` server and its HTTP app.

Only replicas import this module: it takes seconds, since it imports vLLM.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.accelerators import CPUAccelerator
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.llm import LLMConfig
from ray.util.placement_group import PlacementGroup

from pomarium.cluster.engine import resumption
from pomarium.cluster.engine.intake import guard
from pomarium.cluster.engine.resumption import Told
from pomarium.cluster.executor.member import Member
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.http.asgi import App
from pomarium.cluster.http.progress import Listener, groups_of
from pomarium.cluster.node.ray_names import label
from pomarium.cluster.rack.reports import StageReport
from pomarium.cluster.replica.reporting import Load, stages_of
from pomarium.cluster.replica.serve_plan import ModelPlan
from pomarium.cluster.replica.slots import Slots
from pomarium.cluster.replica.step_watch import StepWatch
from pomarium.worker import settings
from pomarium.worker.memory import CPU_AUTO_KV_BYTES

CPU_BACKEND_SIZES = frozenset({"kv_cache_memory_bytes", "gpu_memory_utilization"})
CPU_BACKEND_SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""Arguments and variable that size the KV cache of vLLM's own CPU backend."""


class ModelIsHere(CallbackBase):
    """Spares Ray's download task per node (one more process that imports vLLM): checkpoints are resolved already."""

    async def on_before_node_init(self) -> None:
        """Ray's hook before that task."""
        self.ctx.run_init_node = False


def engine_kwargs(plan: ModelPlan, environ: Mapping[str, str]) -> dict[str, Any]:
    """vLLM's engine arguments: those of the user, the guard of its HTTP application, the step that was planned for, and
    for vLLM's own CPU backend a KV cache of our CPU workers' size.

    Left alone, that backend wants 0.92 of the machine's memory to be free when its worker starts, which Ray, the
    replica and EngineCore do not leave on a machine of 24 GiB (vllm/v1/worker/cpu_worker.py).
    """
    given = {**plan.engine_args, "middleware": [guard.PATH]}
    if settings.load(environ).use_mlx:
        return given | {"max_num_batched_tokens": plan.step_tokens, "max_num_seqs": plan.step_requests}
    sized = not CPU_BACKEND_SIZES.isdisjoint(given) or environ.get(CPU_BACKEND_SPACE)
    return given if sized else given | {"kv_cache_memory_bytes": CPU_AUTO_KV_BYTES}


def llm_config(plan: ModelPlan, folder: Path, stages: int) -> LLMConfig:
    """`plan` for Ray Serve LLM. Kind `cpu` spares its GPU task; the platform replaces the executor that it forces."""
    return LLMConfig(
        model_loading_config={"model_id": plan.name, "model_source": str(folder)},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": 1}]},  # of vLLM's own backend; our workers have a group already
        callback_config={"callback_class": ModelIsHere},
        engine_kwargs=engine_kwargs(plan, os.environ) | {"pipeline_parallel_size": stages},
        log_engine_metrics=True,
    )


class Reserved(CPUAccelerator):
    """Ray's hook for hardware whose placement group exists before the engine's configuration does."""

    def __init__(self, group: PlacementGroup) -> None:
        self._group = group

    def create_placement_group(self, *args: Any, **kwargs: Any) -> PlacementGroup:
        """The group that our workers are on."""
        return self._group


class LabelledEngine(VLLMEngine):
    """VLLMEngine whose metrics carry a name of the model that Ray takes. Requests are told its own: that is read from
    the arguments, not from the configuration (vllm/entrypoints/launchers/api_server/app_state.py)."""

    def _start_async_llm_engine(self, args: Any, config: Any, group: PlacementGroup) -> Any:
        config.model_config.served_model_name = label(config.model_config.served_model_name)
        return super()._start_async_llm_engine(args, config, group)


class UnreportedServer(LLMServer):
    """LLMServer without the usage report after the start, which keeps a start waiting for one more process."""

    async def start(self, group: PlacementGroup | None = None) -> None:
        """Start the engine, with its workers on `group` if there is one."""
        if group is not None:
            self._llm_config.get_engine_config()._accelerator = Reserved(group)
        self.engine = LabelledEngine(self._llm_config)
        await self.engine.start()


class Server:
    """A started engine: health and its OpenAI HTTP application (vLLM's own)."""

    def __init__(self, server: Any, app: App) -> None:
        self._server = server
        self.app = app

    @classmethod
    async def start(cls, plan: ModelPlan, folder: Path, stages: int, group: PlacementGroup | None) -> "Server":
        """Start the engine of `stages` workers on `group`, which were offered to it (executor.handover).

        Args:
            group: None where vLLM's own backend serves.

        Raises:
            Exception: whatever Ray or vLLM raise; `faults.sentence` makes it readable.
        """
        server = UnreportedServer.sync_init(llm_config(plan, folder, stages))
        await server.start(group)
        return cls(server, await server.engine.build_asgi_app())

    def load(self, steps: StepWatch, slots: Slots) -> Load:
        """The engine's load from now on; `steps` and `slots` are told of each step that ends."""
        load = Load(steps, slots)
        self._client.logger_manager.stat_loggers.append(load)
        return load

    async def stages(self, members: Sequence[Member]) -> tuple[StageReport, ...]:
        """What each of the engine's workers runs and holds."""
        layers = self._client.model_config.hf_text_config.num_hidden_layers
        return stages_of(members, layers, await self._client.collective_rpc("memory_held"))

    @contextmanager
    def telling(self, asked: Asked, listener: Listener) -> Iterator[None]:
        """What the application is asked in here is `asked`; `listener` is told of the tokens of its answer. Raises
        ValueError if `asked.resume` holds none."""
        told = Told(asked.seed, () if asked.resume is None else groups_of(asked.resume.groups))
        listener.tell(told)
        with resumption.telling(told):
            yield

    def busy(self) -> bool:
        """Whether requests are unfinished."""
        return bool(self._client.output_processor.has_unfinished_requests())

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return int(self._client.model_config.max_model_len)

    @property
    def cache_tokens(self) -> int:
        """Of the KV cache."""
        cache = self._client.vllm_config.cache_config
        return int(cache.num_gpu_blocks or 0) * int(cache.block_size)

    @property
    def _client(self) -> Any:
        """vLLM's AsyncLLM."""
        return self._server.engine._engine_client

    def exit_code(self) -> int | None:
        """Of the process EngineCore, negative for a signal; None if it runs, or is none of this process's."""
        manager = self._client.engine_core.resources.engine_manager
        codes = [process.exitcode for process in ([] if manager is None else manager.processes)]
        return next((code for code in codes if code is not None), None)

    async def check_health(self) -> None:
        """Raises vLLM's EngineDeadError once the engine is gone."""
        await self._server.check_health()
