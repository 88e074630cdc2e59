"""The host's part of a step: processor time outside the device, by part and by executor, in us per step.

    model: depth, vocabulary and tokenizer of the embedded one at width 16, so that its arithmetic is nothing
    for each executor an engine in this process, with one worker (host_worker.py): uni in this process, vLLM's
    RayExecutorV2 and RackExecutor on a Mac of a simulated rack --in turns, R requests--> us per step of
        the engine's thread: vLLM's scheduler, executor, detokenisation, the engine's loop around them (host_parts.py)
        the worker's thread: bookkeeping, graph (the model's call until it waits for the device), sampling
        all other threads of either process: the executor's

What Ray's threads use while nothing runs is taken off. On a CPU the device is MLX's threads and the BLAS's. vLLM's
front end has a process of its own when it serves; here it is in the engine's, and what passes between is not seen.

    python benchmarks/step_host.py [--executors uni RayExecutorV2 RackExecutor] [--requests 1 8 32] [--tokens 100]
                                   [--rounds 5] [--quick]
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from executors import OURS, PROMPT_TOKENS, V2, rack
from host_parts import Parts, thread_seconds, used
from measure import Load

HERE = Path(__file__).resolve().parent
UNI = "uni"
SCHEDULER, ENGINE_END, WORKER_END = "vLLM's scheduler", "executor, engine's end", "executor, worker's end"
DETOKENISATION, LOOP = "detokenisation", "engine's loop"
PARTS = (SCHEDULER, ENGINE_END, WORKER_END, "worker's bookkeeping", "graph", "sampling", DETOKENISATION, LOOP)
TOTAL, DEVICE, WALL = "all of the host", "the device's threads", "wall time"
WIDTH = 16
IDLE_S = 1.0
QUICK_TOKENS = 20

Row = Mapping[str, float]
"""us per step by part."""


@dataclass(frozen=True)
class Times:
    """Seconds of processor time so far.

    Attributes:
        parts: of the engine's thread and the worker's.
        engine_others: the other threads of the engine's process, without the device's.
        worker: the worker's process without the device; 0 where it is the engine's.
        device: the device's threads.
    """

    wall: float
    parts: Mapping[str, float]
    engine_others: float
    worker: float
    device: float


class Engine:
    """An engine of this process whose thread tells the time of its parts."""

    def __init__(self, model: Path, executor: Any) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(model),
            worker_cls="host_worker.HostWorker",
            distributed_executor_backend=executor,
            max_model_len=512,
            max_num_seqs=64,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        engine: Any = self.llm.llm_engine
        core = engine.engine_core.engine_core
        self.executor = core.model_executor
        self._inline = executor == UNI
        self._parts = parts = self.executor.driver_worker.worker.parts if self._inline else Parts()
        for name in ("schedule", "update_from_output", "get_grammar_bitmask"):
            setattr(core.scheduler, name, parts.of(SCHEDULER, getattr(core.scheduler, name)))
        for name in ("execute_model", "sample_tokens"):
            setattr(self.executor, name, parts.of(ENGINE_END, self._waited_for(getattr(self.executor, name))))
        processor = engine.output_processor
        processor.process_outputs = parts.of(DETOKENISATION, processor.process_outputs)
        engine.step = parts.of(LOOP, engine.step)

    def _waited_for(self, call: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            answer = call(*args, **kwargs)
            if isinstance(answer, Future):
                answer.result = self._parts.of(ENGINE_END, answer.result)  # type: ignore[method-assign]
            return answer

        return called

    def times(self) -> Times:
        """So far."""
        (worker,) = self.executor.collective_rpc("host_times")
        threads, wall = thread_seconds(), time.perf_counter()
        others = used({}, threads, frozenset({threading.get_native_id()}))
        parts = {part: ns / 1e9 for part, ns in self._parts.ns.items()}
        if self._inline:
            return Times(wall, parts, others - worker.device, 0.0, worker.device)
        return Times(wall, parts | worker.parts, others, worker.process, worker.device)

    def run(self, requests: int, tokens: int) -> tuple[Times, Times]:
        """Times before and after `tokens` steps of so many requests."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        prompts: Sequence[Any] = [{"prompt_token_ids": [7 + index] * PROMPT_TOKENS} for index in range(requests)]
        before = self.times()
        self.llm.generate(prompts, params, use_tqdm=False)
        return before, self.times()


def main() -> None:
    """See the module."""
    options = _options()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        "HF_HUB_OFFLINE": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    found: dict[tuple[str, int], list[Row]] = {}
    with tempfile.TemporaryDirectory(prefix="pmx", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        model = Path(folder) / "model"
        # In a process of its own: the worker of uni tells the device's threads by their birth.
        writing = multiprocessing.get_context("spawn").Process(target=write_model, args=(model,))
        writing.start()
        writing.join()
        with rack(2):
            import ray_executor_v2

            from pomarium.cluster.executor.rack_executor import RackExecutor

            backends = {UNI: UNI, V2: ray_executor_v2.Executor, OURS: RackExecutor}
            engines: dict[str, Engine] = {}
            try:
                for name in options.executors:
                    engines[name] = Engine(model, backends[name])
                others = measure(engines, options, found)
            finally:
                for engine in engines.values():
                    engine.executor.shutdown()
    print(f"{os.cpu_count()} cores, of which others used {others:.2f}; {options.tokens} steps; us per step, median of "
          f"{options.rounds} rounds in turns (lowest to highest)\n")  # fmt: skip
    print(_table(found, options))


def measure(
    engines: Mapping[str, Engine], options: argparse.Namespace, found: dict[tuple[str, int], list[Row]]
) -> float:
    """Add a row to `found` for each round, executor and number of requests; the cores that others used."""
    load = Load()
    idle = {name: idle_of(engine) for name, engine in engines.items()}
    for turn in range(options.rounds + 1):
        for requests in options.requests:
            for name, engine in engines.items():
                before, after = engine.run(requests, options.tokens)
                if turn:  # the first round warms up
                    found.setdefault((name, requests), []).append(row_of(before, after, idle[name], options.tokens))
        print(f"round {turn} of {options.rounds}", file=sys.stderr, flush=True)
    return load.others()


def idle_of(engine: Engine) -> tuple[float, float]:
    """Cores that the other threads of the engine's process, and the worker's process, use while nothing runs."""
    before = engine.times()
    time.sleep(IDLE_S)
    after = engine.times()
    wall = after.wall - before.wall
    return (after.engine_others - before.engine_others) / wall, (after.worker - before.worker) / wall


def row_of(before: Times, after: Times, idle: tuple[float, float], steps: int) -> Row:
    """us per step by part, of what was used between."""
    wall = after.wall - before.wall
    seconds = {part: after.parts.get(part, 0.0) - before.parts.get(part, 0.0) for part in PARTS}
    worker = after.worker - before.worker
    if worker:
        in_worker = sum(seconds[part] for part in ("worker's bookkeeping", "graph", "sampling"))
        seconds[WORKER_END] = worker - idle[1] * wall - in_worker
    seconds[ENGINE_END] += after.engine_others - before.engine_others - idle[0] * wall
    seconds[TOTAL] = sum(seconds.values())
    seconds |= {DEVICE: after.device - before.device, WALL: wall}
    return {part: 1e6 * value / steps for part, value in seconds.items()}


def write_model(folder: Path) -> None:
    """The embedded model's configuration and tokenizer, with random weights of width WIDTH."""
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    from pomarium.worker.models import embedded

    source = embedded.path()
    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("quantization")}
    config |= {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1}
    config |= {"head_dim": WIDTH // 2, "dtype": "float32", "torch_dtype": "float32"}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*", "config.json"))
    (folder / "config.json").write_text(json.dumps(config))
    parameters = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), parameters, {"format": "mlx"})


def _table(found: Mapping[tuple[str, int], Sequence[Row]], options: argparse.Namespace) -> str:
    from report import table

    columns = [(name, requests) for requests in options.requests for name in options.executors]
    rows = []
    for part in (*PARTS, TOTAL, DEVICE, WALL):
        cells = []
        for column in columns:
            values = [row[part] for row in found[column]]
            spread = f" ({min(values):.0f} to {max(values):.0f})" if part in (TOTAL, WALL) else ""
            cells.append(f"{statistics.median(values):.0f}{spread}")
        rows.append([part, *cells])
    return table(["us per step", *(f"{name}, {requests}" for name, requests in columns)], rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [UNI, V2, OURS]
    parser.add_argument("--executors", nargs="+", choices=names, default=names)
    parser.add_argument("--requests", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=100, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK_TOKENS} steps, to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.rounds = QUICK_TOKENS, 1
    return options


if __name__ == "__main__":
    main()
