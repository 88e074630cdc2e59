"""What an executor costs per step: RackExecutor beside vLLM's RayExecutorV2, workers that compute nothing.

    a simulated rack: the head, where the engine runs, and a Mac with an address of its own for each worker
    for each number of stages: two engines in this process, one per executor --in turns--> ms per token, and us of
    processor time of the engine's process and all workers'

Both drive the same workers (tests/rack/stub_worker.py) under the same scheduler; a token's time is then that of the
engine and of the way to the workers and back. One stream waits for each token; 32 share a step. Where other programs
have the processor for part of the time, processor time is the steadier figure.

    python benchmarks/executors.py [--stages 1 2] [--streams 1 32] [--tokens 200] [--rounds 5]
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from measure import Load

if TYPE_CHECKING:
    from vllm import LLM

HERE = Path(__file__).resolve().parent
FOLDERS = (HERE, HERE.parent / "tests" / "rack")
PROMPT_TOKENS = 16
V2, OURS = "RayExecutorV2", "RackExecutor"


@dataclass(frozen=True)
class Took:
    """For a token of each stream: ms of wall time, us of processor time in all processes."""

    wall_ms: float
    processor_us: float


def main() -> None:
    """See the module."""
    options = _options()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    sys.path[:0] = map(str, FOLDERS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="pmx", dir="/tmp", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        with rack(2 * max(options.stages)):
            for stages in options.stages:
                rows += compare(stages, options)
    from report import table

    header = ["stages", "streams", f"{V2}, ms/token", f"{OURS}, ms/token", "ours to theirs"]
    header += [f"{V2}, us of processor", f"{OURS}, us of processor", "ours to theirs", "others' cores"]
    print(f"{os.cpu_count()} cores; {options.tokens} tokens; median of {options.rounds} rounds in turns\n")
    print(table(header, rows))


@contextlib.contextmanager
def rack(workers: int) -> Iterator[None]:
    """A simulated rack with a Mac for each worker; this process connects to its head."""
    from pomarium.cluster.rack.simulate import simulated

    with simulated(workers) as started:
        os.environ.update(started.environment())
        import ray

        ray.init(address=started.current.address, logging_level="ERROR", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()


def compare(stages: int, options: argparse.Namespace) -> list[list[str]]:
    """A row for each number of streams."""
    import ray_executor_v2
    from ray.util.placement_group import remove_placement_group

    from pomarium.cluster.executor.rack_executor import RackExecutor

    rows, llms = [], {}
    try:
        for name, executor in ((V2, ray_executor_v2.Executor), (OURS, RackExecutor)):
            llms[name] = engine(stages, executor)
        for streams in options.streams:
            times: dict[str, list[Took]] = {name: [] for name in llms}
            load = Load()
            for turn in range(options.rounds + 1):
                for name, llm in llms.items():
                    took = per_token(llm, streams, options.tokens)
                    if turn:  # the first round warms up
                        times[name].append(took)
            walls = [[took.wall_ms for took in times[name]] for name in (V2, OURS)]
            processors = [[took.processor_us for took in times[name]] for name in (V2, OURS)]
            figures = [*_compared(*walls, digits=2), *_compared(*processors, digits=0), f"{load.others():.2f}"]
            rows.append([str(stages), str(streams), *figures])
            print(f"{stages} stage(s), {streams} streams: {figures}", file=sys.stderr, flush=True)
    finally:
        for llm in llms.values():
            executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
            executor.shutdown()
            if (group := executor.parallel_config.placement_group) is not None:  # RayExecutorV2 keeps it
                remove_placement_group(group)
    return rows


def _compared(theirs: Sequence[float], ours: Sequence[float], digits: int) -> list[str]:
    ratio = statistics.median(our / their for their, our in zip(theirs, ours, strict=True))
    return [f"{statistics.median(theirs):.{digits}f}", f"{statistics.median(ours):.{digits}f}", f"{ratio:.2f}x"]


def engine(stages: int, executor: type) -> "LLM":
    """An engine in this process over stub workers."""
    from vllm import LLM

    from pomarium.worker.models import embedded

    return LLM(
        str(embedded.path()),
        worker_cls="stub_worker.StubWorker",
        pipeline_parallel_size=stages,
        distributed_executor_backend=executor,
        max_model_len=512,
        max_num_seqs=64,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )


def per_token(llm: "LLM", streams: int, tokens: int) -> Took:
    """Generate `tokens` tokens on each of so many streams."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
    prompts: Sequence[Any] = [{"prompt_token_ids": [7 + index] * PROMPT_TOKENS} for index in range(streams)]
    executor: Any = llm.llm_engine.engine_core.engine_core.model_executor
    before, began = _processor_s(executor), time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    wall = time.perf_counter() - began
    return Took(1e3 * wall / tokens, 1e6 * (_processor_s(executor) - before) / tokens)


def _processor_s(executor: Any) -> float:
    """Processor time so far of this process and the executor's workers."""
    return time.process_time() + sum(executor.collective_rpc(_of_worker))


def _of_worker(worker: object) -> float:
    return time.process_time()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--streams", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
