"""What the cohort scheduler does to the stages of a pipeline, beside vLLM's own, on a virtual clock.

    streams x arrival x step cost x link delay x stages --virtual_stages--> idle share, tokens/s, time per token

The figures are exact: they depend on the schedulers and on the costs given, on no machine. The engine is vLLM's.

    python benchmarks/pipeline_clock.py [--stages 1 2 3 4] [--engine-ms 1] [--parts decode prompts cohorts]
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")

from report import table
from virtual_stages import Arrival, Costs, Pipeline, Played, engine, plain
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pomarium.cluster.engine.scheduling.scheduler import CohortScheduler

PARTS = ("decode", "prompts", "cohorts")
STEPS = (Costs(20, 0), Costs(12, 1))
LINKS_MS = (0.0, 0.3, 1.0)
LOADS = ((1, 0.0), (4, 0.0), (4, 70.0), (16, 0.0), (16, 70.0))
"""Streams, and milliseconds between their arrivals."""
TOKENS = 100
WARM_MS = 200.0


class OneMoreCohort(CohortScheduler):
    """S + 1 cohorts."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.cohorts += 1


def main() -> None:
    """See the module."""
    options = _options()
    print(f"Engine delay {options.engine_ms:g} ms for each step. Idle: share of the time between the last stream's")
    print("first token and the first stream's last one, mean of the stages.\n")
    if "decode" in options.parts:
        print(decode(options.stages, options.engine_ms) + "\n")
    if "prompts" in options.parts:
        print(prompts(options.stages, options.engine_ms) + "\n")
    if "cohorts" in options.parts:
        print(cohorts(options.stages, options.engine_ms))


def decode(stages: Sequence[int], engine_ms: float) -> str:
    """Streams of TOKENS tokens, prompts of four."""
    rows = []
    for count in stages:
        with engine(count) as ours, engine(count, AsyncScheduler) as stock:
            for costs, (streams, gap) in _cases(engine_ms):
                arrivals = [Arrival([7 + i] * 4, plain(TOKENS), i * gap) for i in range(streams)]
                pair = [_figures(pipeline, arrivals, costs) for pipeline in (stock, ours)]
                load = f"{streams}, every {gap:g} ms" if gap else f"{streams} at once" if streams > 1 else "1"
                cost = f"{costs.fixed_ms:g} + {costs.token_ms:g} x tokens"
                rows.append([str(count), cost, f"{costs.link_ms:g}", load, *_columns(*pair)])
    header = ["stages", "step, ms", "link, ms", "streams", "idle: vLLM", "ours", "tokens/s: vLLM", "ours", "gain"]
    return table([*header, "ms per token: vLLM", "ours"], rows)


def _cases(engine_ms: float) -> Iterator[tuple[Costs, tuple[int, float]]]:
    for step in STEPS:
        for link in LINKS_MS:
            for load in LOADS:
                yield replace(step, link_ms=link, engine_ms=engine_ms), load


Figures = tuple[float, float, float]


def _figures(pipeline: Pipeline, arrivals: Sequence[Arrival], costs: Costs) -> Figures:
    """Idle share, tokens per second, ms from token to token of the first stream."""
    played = pipeline.play(arrivals, costs)
    window = played.window(WARM_MS)
    idle = played.idle(window)
    return sum(idle) / len(idle), played.rate(window), _gap(played, window)


def _gap(played: Played, window: tuple[float, float]) -> float:
    times = [time for time in played.times[0] if window[0] <= time <= window[1]]
    return (times[-1] - times[0]) / (len(times) - 1)


def _columns(stock: Figures, ours: Figures) -> list[str]:
    idle = [f"{100 * figures[0]:.1f}%" for figures in (stock, ours)]
    rate = [f"{figures[1]:.1f}" for figures in (stock, ours)]
    return [*idle, *rate, f"{ours[1] / stock[1]:.2f}x", *(f"{figures[2]:.1f}" for figures in (stock, ours))]


def prompts(stages: Sequence[int], engine_ms: float) -> str:
    """A prompt of 1500 tokens comes while as many streams as stages run."""
    costs = Costs(12, 1, 0.3, engine_ms)
    rows = []
    for count in stages:
        short = [Arrival([7 + i] * 4, plain(150)) for i in range(count)]
        arrivals = [*short, Arrival(list(range(3, 103)) * 15, plain(20), 500.0)]
        row = [str(count)]
        with engine(count) as ours, engine(count, AsyncScheduler) as stock:
            played = [pipeline.play(arrivals, costs) for pipeline in (stock, ours)]
        row += [f"{one.times[-1][0] - 500:.0f}" for one in played]
        row += [f"{max(b - a for own in one.times[:-1] for a, b in pairwise(own)):.0f}" for one in played]
        rows.append(row)
    header = ["stages", "first token, ms: vLLM", "ours", "worst gap of the others, ms: vLLM", "ours"]
    return table(header, rows)


def cohorts(stages: Sequence[int], engine_ms: float) -> str:
    """S cohorts beside S + 1, 64 streams at once."""
    rows = []
    for count in (count for count in stages if count > 1):
        with engine(count) as ours, engine(count, OneMoreCohort) as more:
            for link in (0.3, 1.0, 3.0, 6.0, 12.0):
                arrivals = [Arrival([7 + i] * 4, plain(TOKENS)) for i in range(64)]
                pair = [_figures(pipeline, arrivals, Costs(12, 1, link, engine_ms)) for pipeline in (ours, more)]
                idle = [f"{100 * figures[0]:.1f}%" for figures in pair]
                rows.append([str(count), f"{link:g}", *idle, *(f"{figures[1]:.1f}" for figures in pair)])
    header = ["stages", "link, ms", "idle: S cohorts", "S + 1", "tokens/s: S cohorts", "S + 1"]
    return table(header, rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--engine-ms", type=float, default=1.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
