"""What the bound on a step's seconds costs a prompt, and what it spares the requests beside it, in vLLM's engine.

    for each round: POMARIUM_STEP_SECONDS 0, then 1 --in-process engine--> streams decode, a prompt of T tokens arrives
                    --> tokens/s of the prompt, widest gap between tokens of a stream, longest step of the worker

The engines run on the same machine in turns. Tokens are also counted per second of the processor, which does not depend
on what else the machine does: set OPENBLAS_NUM_THREADS=1, for threads that wait for each other burn it.

    python benchmarks/step_budget.py [--model DIR] [--prompt 2000] [--streams 2] [--rounds 2] [--seconds 0 1] [--gap 0]
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

from report import table
from vllm import LLM, SamplingParams

from pomarium.worker.model_runner import StepStats
from pomarium.worker.models import embedded

WARM_TOKENS = 512
"""A prompt before the one that is measured: the engine knows its device by then."""


@dataclass(frozen=True)
class Measured:
    """prompt_s, processor_s: until the prompt's first token. gap_s: widest of a stream meanwhile. steps, longest_s: the
    worker's."""

    prompt_s: float
    processor_s: float
    gap_s: float
    steps: int
    longest_s: float


def main() -> None:
    """See the module."""
    options = _options()
    found: dict[float, list[Measured]] = {seconds: [] for seconds in options.seconds}
    for _ in range(options.rounds):
        for seconds in options.seconds:
            with _engine(options.model or embedded.path(), seconds, options) as llm:
                found[seconds].append(measure(llm, options.prompt, options.streams))
    rows = []
    base = statistics.median(one.processor_s for one in found[options.seconds[0]])
    for seconds, times in found.items():
        prompt_s = statistics.median(one.prompt_s for one in times)
        processor_s = statistics.median(one.processor_s for one in times)
        rows.append(
            [
                f"{seconds:g}" if seconds else "no bound",
                f"{options.prompt / prompt_s:.0f}",
                f"{options.prompt / processor_s:.0f}",
                f"{base / processor_s:.2f}",
                f"{statistics.median(one.steps for one in times):.0f}",
                f"{statistics.median(one.longest_s for one in times):.2f}",
                f"{statistics.median(one.gap_s for one in times):.2f}",
            ]
        )
    print(f"A prompt of {options.prompt} tokens beside {options.streams} streams; median of {options.rounds}\n")
    print(
        table(
            ["bound, s", "tokens/s", "per processor s", "of the first", "steps", "longest step, s", "widest gap, s"],
            rows,
        )
    )


def measure(llm: LLM, tokens: int, streams: int) -> Measured:
    """One prompt beside streams that decode."""
    engine, steps = llm.llm_engine, list[StepStats]()
    greedy = SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True, detokenize=False)
    once = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False)
    for length in (WARM_TOKENS, tokens // 2):
        llm.generate([{"prompt_token_ids": _prompt(length, 1)}], once, use_tqdm=False)
    times: dict[str, list[float]] = {str(index): [] for index in range(streams)}
    for name in times:
        engine.add_request(name, {"prompt_token_ids": _prompt(8, 2)}, greedy)
    while any(len(found) < 8 for found in times.values()):
        _note(engine, times)
    llm.collective_rpc(lambda worker: worker.subscribe(steps.append))
    times = {name: found[-1:] for name, found in times.items()}
    began, before = time.perf_counter(), time.process_time()
    engine.add_request("prompt", {"prompt_token_ids": _prompt(tokens, 3)}, once)
    while "prompt" not in times:
        _note(engine, times)
    prompt_s, processor_s = time.perf_counter() - began, time.process_time() - before
    engine.abort_request(list(times))
    gaps = [max(b - a for a, b in pairwise(found)) for name, found in times.items() if len(found) > 1]
    return Measured(prompt_s, processor_s, max(gaps, default=prompt_s), len(steps), max(step.seconds for step in steps))


def _note(engine: object, times: dict[str, list[float]]) -> None:
    for output in engine.step():  # type: ignore[attr-defined]
        times.setdefault(output.request_id, []).append(time.perf_counter())


def _prompt(tokens: int, seed: int) -> list[int]:
    return [100 + (7919 * seed + 31 * index * index) % 20_000 for index in range(tokens)]


@contextmanager
def _engine(model: Path, seconds: float, options: argparse.Namespace) -> Iterator[LLM]:
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "POMARIUM_STEP_SECONDS": f"{seconds:g}",
        "POMARIUM_GAP_SECONDS": f"{options.gap:g}",
    }
    with patch.dict(os.environ, variables):
        llm = LLM(
            str(model),
            max_model_len=max(options.prompt, WARM_TOKENS) + 1024,
            max_num_batched_tokens=options.limit,
            enable_prefix_caching=False,
            disable_log_stats=False,
        )
        try:
            yield llm
        finally:
            core = llm.llm_engine.engine_core.engine_core
            core.model_executor.shutdown()
            core.scheduler.shutdown()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model (default: the embedded one)")
    parser.add_argument("--prompt", type=int, default=2000, help="tokens")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--limit", type=int, default=2048, help="max_num_batched_tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", nargs="+", type=float, default=[0.0, 1.0])
    parser.add_argument("--gap", type=float, default=0.0, help="POMARIUM_GAP_SECONDS (default: 0, none)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
