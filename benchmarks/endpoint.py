"""What the endpoint costs per token: `pomarium serve` beside `vllm serve` and Ray Serve LLM's stock app, one model.

    model: the embedded one's tokenizer, two layers of width 16 with random weights: next to nothing is computed
    each side's servers (endpoint_sides.py), all of them up --in turns, N streams--> client (endpoint_client.py)
        the client's reads --> tokens/s, time to the first event and between tokens
        the processor time of its processes before and after --> us of processor per token and kind of process

A run is a fixed number of streamed completions of TOKENS tokens: each stream sends the next one when it has the last.
Tokens are counted by the usage that each answer tells. The client's own processor time is not the side's, but it takes
the same cores: it is told beside. What a side uses at rest is not taken off, and told in a table of its own.

With --stub, where the endpoint ends: 1 to 8 engines that say a token each 20 ms to each of their streams, whatever
follows (endpoint_worker.py tells what is stubbed: the workers alone), and more and more streams, which begin one after
the other. The endpoint holds while a stream's events are on average at most twice that apart, and its tokens at most a
tenth more: beyond that, what engines have said and the endpoint has not carried piles up, since engines do not wait
(or there is no processor left for the engines themselves). Late is by how much longer a stream took than that.

    python benchmarks/endpoint.py [--sides pomarium vllm ray-llm] [--streams 1 8 32 256] [--rounds 5] [--seconds 10]
                                  [--tokens 256]
    python benchmarks/endpoint.py --stub [--engines 1 2 4 8] [--per-engine 2 5 10 20 30 40 50] [--ingresses 1 2]
    either with --quick: sees that it runs

    python benchmarks/endpoint.py --sides pomarium pomarium-failovers-0 --streams 8 --rounds 20

tells what it costs that an answer could go on elsewhere: the ratio of the two, round by round, with its confidence
interval.

Ray Serve LLM joins the tokens of 50 ms by default, which saves processor time: see its tokens per arrival. Its direct
streaming (--sides ... ray-llm-direct) takes HAProxy, and listens on all of this machine's addresses, which Ray does
not let choose: it is measured only if it is named.
"""

import argparse
import json
import math
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from endpoint_client import Client, Outcome, Run, client
from endpoint_sides import (
    DIRECT,
    ENDPOINT_KINDS,
    ENGINE,
    KINDS,
    MODEL,
    NO_FAILOVER,
    POMARIUM,
    RAY,
    RAY_LLM,
    SIDES,
    VLLM,
    NotStartedError,
    Running,
    Side,
    binary_of_haproxy,
    running,
)
from measure import Load
from report import table

from pomarium.cluster.machine import descriptors

LAYERS = 2
LAYER = "model.layers."
TOKENS, QUICK_TOKENS, WARM_TOKENS, MOST_TOKENS = 256, 16, 32, 4000
"""Of an answer; the last is what the context of endpoint_sides.py has room for."""
PERIOD_S = 0.02
"""As in endpoint_worker.py, which imports vLLM."""
PACE, APART = 1.1, 2.0
"""Times the period: between tokens, between arrivals."""
STARTS_S = 0.01
"""Between the starts of two streams on stub engines."""
NORMAL_95 = 1.96
"""Half the width of 95% of a normal distribution, in its standard deviations."""

REST_S = 3.0
RUN_S = 900.0
"""A run that takes longer has failed."""

Found = dict[tuple[str, int], list["Measured"]]
"""Rounds by side and number of streams."""


@dataclass(frozen=True)
class Measured:
    """One run. processor: us per token by kind of process. others: cores that other programs used meanwhile."""

    outcome: Outcome
    processor: Mapping[str, float]
    others: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.outcome.tokens / self.outcome.wall

    @property
    def endpoint(self) -> float:
        """us per token of all processes between EngineCore and the client."""
        return sum(self.processor.get(kind, 0.0) for kind in ENDPOINT_KINDS)


@dataclass(frozen=True)
class Level:
    """A number of streams on stub engines, and how it went."""

    name: str
    engines: int
    ingresses: int
    streams: int
    measured: Measured

    @property
    def carried(self) -> float:
        """Tokens per second while all streams run."""
        return self.streams / self.measured.outcome.token

    @property
    def late_s(self) -> float:
        """See the module; the median of streams."""
        outcome = self.measured.outcome
        return (outcome.token - PERIOD_S) * (outcome.tokens / self.streams - 1)

    @property
    def held(self) -> bool:
        """See the module."""
        outcome = self.measured.outcome
        return outcome.token <= PACE * PERIOD_S and outcome.between <= APART * PERIOD_S


def main() -> None:
    """See the module."""
    options = _options()
    descriptors.raise_limit()  # for all that it starts, too
    # A shell's background job begins with SIGINT ignored, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="pmx", dir="/tmp", ignore_cleanup_errors=True) as name, client() as asker:
        folder = Path(name)
        write_model(folder / "model")
        measured = stubbed if options.stub else compared
        print("\n\n".join(measured(options, folder, asker)))


def compared(options: argparse.Namespace, folder: Path, asker: Client) -> list[str]:
    """All sides in turns; what is to be printed."""
    found: Found = {}
    missing: list[str] = []
    with ExitStack() as stack:
        started = []
        for name in options.sides:
            if name == DIRECT and binary_of_haproxy() is None:
                missing.append(f"{name} was not measured: no haproxy is installed")
                continue
            try:
                started.append(stack.enter_context(running(Side(name), folder / "model", folder, say)))
            except NotStartedError as error:
                missing.append(f"{name} was not measured: {error}")
                say(missing[-1])
        requests = {
            (side.side.name, streams): warmed(side, asker, streams, options)
            for streams in options.streams
            for side in started
        }
        rest = {side.side.name: at_rest(side) for side in started}
        for turn in range(options.rounds):
            for streams in options.streams:
                for side in started:
                    count = requests[side.side.name, streams]
                    run = Run(side.port, MODEL, streams, count, options.tokens, RUN_S)
                    found.setdefault((side.side.name, streams), []).append(measure(side, asker, run))
            say(f"round {turn + 1} of {options.rounds}")
    head = f"{os.cpu_count()} cores; answers of {options.tokens} tokens, at least one a stream, runs of about "
    head += f"{options.seconds:g} s; median of {options.rounds} rounds in turns (lowest to highest)"
    tables = [speeds(found), processors(found), rests(rest)] if found else []
    return [head, *missing, *tables, *failover(found)]


def stubbed(options: argparse.Namespace, folder: Path, asker: Client) -> list[str]:
    """More and more streams on stub engines; what is to be printed."""
    levels: list[Level] = []
    missing: list[str] = []
    for name in options.sides:
        for ingresses in options.ingresses if name == POMARIUM else (1,):
            words = (f"--ingresses={ingresses}",) if name == POMARIUM else ()
            for engines in options.engines if name == POMARIUM else (1,):
                side = Side(name, engines, stub=True, words=words)
                try:
                    with running(side, folder / "model", folder, say) as started:
                        levels += climbed(started, asker, ingresses, options)
                except NotStartedError as error:
                    missing.append(f"{name} with {engines} stub engines was not measured: {error}")
                    say(missing[-1])
    head = f"{os.cpu_count()} cores; stub engines, a token each {1e3 * PERIOD_S:g} ms, streams of "
    head += f"{options.tokens} tokens"
    return [head, *missing, *([climb(levels), ends(levels)] if levels else [])]


def climbed(side: Running, asker: Client, ingresses: int, options: argparse.Namespace) -> Iterator[Level]:
    """More and more streams, up to the first number that does not hold."""
    engines = side.side.engines
    asker.ask(Run(side.port, MODEL, 4 * engines, 2, WARM_TOKENS, RUN_S))
    for per_engine in options.per_engine:
        streams = engines * per_engine
        run = Run(side.port, MODEL, streams, 1, options.tokens, RUN_S, STARTS_S)
        level = Level(side.side.name, engines, ingresses, streams, measure(side, asker, run))
        say(f"{side.side.name}, {engines} engines, {streams} streams: {level.carried:.0f} tokens/s")
        yield level
        if not level.held:
            return


def measure(side: Running, asker: Client, run: Run) -> Measured:
    """One run. Raises RuntimeError if an answer is not whole."""
    side.look()
    load, before = Load(), side.used()
    outcome = asker.ask(run)
    after = side.used()
    processor = {kind: 1e6 * (after[kind] - before[kind]) / outcome.tokens for kind in after}
    return Measured(outcome, processor, load.others())


def warmed(side: Running, asker: Client, streams: int, options: argparse.Namespace) -> int:
    """Requests of a stream that take about as long as a run is to, by one run that warms up."""
    outcome = asker.ask(Run(side.port, MODEL, streams, 1, min(WARM_TOKENS, options.tokens), RUN_S))
    wanted: float = options.seconds * outcome.tokens / outcome.wall / (streams * options.tokens)
    return max(1, round(wanted))


def at_rest(side: Running) -> Mapping[str, float]:
    """Cores that its processes use while nothing is asked, by kind."""
    side.look()
    before, began = side.used(), time.monotonic()
    time.sleep(REST_S)
    after, wall = side.used(), time.monotonic() - began
    return {kind: (after[kind] - before[kind]) / wall for kind in after}


def write_model(folder: Path) -> None:
    """The model of step_host.py, its first layers."""
    import mlx.core as mx
    import step_host

    step_host.write_model(folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": LAYERS}))
    first = tuple(f"{LAYER}{layer}." for layer in range(LAYERS))
    arrays = cast(dict[str, mx.array], mx.load(str(weights)))
    kept = {name: array for name, array in arrays.items() if not name.startswith(LAYER) or name.startswith(first)}
    mx.eval(kept)
    mx.save_safetensors(str(weights), kept, {"format": "mlx"})


def speeds(found: Found) -> str:
    """What clients see, a row for each side and number of streams."""
    rows = []
    for (name, streams), rounds in in_order(found):
        rows.append([
            name,
            str(streams),
            spread([one.rate for one in rounds], 0),
            ratio(rounds, found.get((VLLM, streams)), lambda one: one.rate),
            median([1e3 * one.outcome.first_p50 for one in rounds], 1),
            median([1e3 * one.outcome.first_p99 for one in rounds], 1),
            spread([1e3 * one.outcome.token for one in rounds], 2),
            median([1e3 * one.outcome.gap_p50 for one in rounds], 2),
            median([1e3 * one.outcome.gap_p99 for one in rounds], 2),
            median([one.outcome.tokens / one.outcome.arrivals for one in rounds], 2),
            median([one.outcome.client / one.outcome.wall for one in rounds], 2),
            f"{max(one.others for one in rounds):.2f}",
        ])  # fmt: skip
    header = ["", "streams", "tokens/s", "to vllm serve", "first event p50, ms", "p99", "time per token, ms"]
    header += ["between arrivals p50, ms", "p99", "tokens per arrival", "client's cores", "others' cores"]
    return table(header, rows)


def processors(found: Found) -> str:
    """us of processor per token by kind of process."""
    rows = []
    for (name, streams), rounds in in_order(found):
        by_kind = {kind: median([one.processor.get(kind, 0.0) for one in rounds], 0) for kind in KINDS}
        sums = spread([one.endpoint for one in rounds], 0)
        to = ratio(rounds, found.get((VLLM, streams)), lambda one: one.endpoint)
        parts = [by_kind[kind] for kind in ENDPOINT_KINDS]
        rows.append([name, str(streams), *parts, sums, to, by_kind[ENGINE], by_kind[RAY]])
    header = ["us of processor per token", "streams", *ENDPOINT_KINDS, "endpoint in all", "to vllm serve", ENGINE, RAY]
    return table(header, rows)


def failover(found: Found) -> Iterator[str]:
    """What it costs that answers could go on elsewhere, where both were measured."""
    for (name, streams), rounds in in_order(found):
        without = found.get((NO_FAILOVER, streams), ())
        if name == POMARIUM and len(without) > 1:
            logs = [math.log(one.endpoint / other.endpoint) for one, other in zip(rounds, without, strict=True)]
            mean, error = statistics.mean(logs), NORMAL_95 * statistics.stdev(logs) / math.sqrt(len(logs))
            low, middle, high = (math.exp(value) for value in (mean - error, mean, mean + error))
            yield (
                f"failover, {streams} streams: {middle:.3f}x of the endpoint's processor time per token without it, "
                f"95% of {low:.3f} to {high:.3f}, {len(logs)} pairs"
            )


def rests(found: Mapping[str, Mapping[str, float]]) -> str:
    """Cores used at rest."""
    rows = [[name, *(f"{cores.get(kind, 0.0):.3f}" for kind in KINDS)] for name, cores in found.items()]
    return table(["cores used at rest", *KINDS], rows)


def climb(levels: Sequence[Level]) -> str:
    """All numbers of streams."""
    rows = [
        [
            level.name,
            str(level.ingresses),
            str(level.engines),
            str(level.streams),
            f"{level.streams / PERIOD_S:.0f}",
            f"{level.carried:.0f}",
            f"{1e3 * level.measured.outcome.token:.1f}",
            f"{1e3 * level.measured.outcome.between:.1f}",
            f"{1e3 * level.measured.outcome.gap_p99:.0f}",
            f"{level.late_s:.1f}",
            f"{1e3 * level.measured.outcome.first_p50:.0f}",
            f"{level.measured.endpoint:.0f}",
            f"{level.measured.outcome.client / level.measured.outcome.wall:.2f}",
            f"{level.measured.others:.2f}",
            "yes" if level.held else "no",
        ]
        for level in levels
    ]
    header = ["", "ingresses", "engines", "streams", "tokens/s said", "carried", "time per token, ms"]
    header += ["between arrivals, ms", "p99", "late, s", "first event, ms", "us of processor per token"]
    return table([*header, "client's cores", "others' cores", "holds"], rows)


def ends(levels: Sequence[Level]) -> str:
    """The most that was carried while it held, and in all, for each set of engines."""
    groups: dict[tuple[str, int, int], list[Level]] = {}
    for level in levels:
        groups.setdefault((level.name, level.ingresses, level.engines), []).append(level)
    rows = []
    for (name, ingresses, engines), group in groups.items():
        held = [level.carried for level in group if level.held]
        ended = "yes" if len(held) < len(group) else "no, further streams were not asked for"
        most = max(level.carried for level in group)
        rows.append([name, str(ingresses), str(engines), f"{max(held, default=0.0):.0f}", f"{most:.0f}", ended])
    return table(["tokens/s", "ingresses", "engines", "most that holds", "most of all", "its end was found"], rows)


def in_order(found: Found) -> list[tuple[tuple[str, int], list[Measured]]]:
    """By streams, then by side."""
    return sorted(found.items(), key=lambda item: (item[0][1], SIDES.index(item[0][0])))


def ratio(rounds: Sequence[Measured], theirs: Sequence[Measured] | None, of: Callable[[Measured], float]) -> str:
    """Of the rounds in pairs, the median; a dash where there is nothing to compare with."""
    pairs = [of(one) / of(other) for one, other in zip(rounds, theirs or (), strict=False) if of(other)]
    return f"{statistics.median(pairs):.2f}x" if pairs else "–"


def median(values: Sequence[float], digits: int) -> str:
    """As text."""
    return f"{statistics.median(values):.{digits}f}"


def spread(values: Sequence[float], digits: int) -> str:
    """The median, and lowest to highest if there are several."""
    if len(values) == 1:
        return median(values, digits)
    return f"{median(values, digits)} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def say(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, help="default: all but ray-llm-direct; with --stub the first two"
    )
    parser.add_argument("--streams", nargs="+", type=int, help="at once (default: 1 8 32 256)")
    parser.add_argument("--tokens", type=int, help=f"of an answer (default: {TOKENS}); few show what a request costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="that a run takes about; with --stub a stream's length"
    )
    parser.add_argument(
        "--stub", action="store_true", help="find where the endpoint ends, with engines that compute nothing"
    )
    parser.add_argument("--engines", nargs="+", type=int, help="with --stub (default: 1 2 4 8)")
    parser.add_argument("--per-engine", nargs="+", type=int, help="streams, with --stub (default: 2 5 10 20 30 40 50)")
    parser.add_argument("--ingresses", nargs="+", type=int, default=[1, 2], help="with --stub (default: 1 2)")
    parser.add_argument("--quick", action="store_true", help="one short round of few streams, to see that it runs")
    options = parser.parse_args()
    options.sides = options.sides or ([POMARIUM, VLLM] if options.stub else [POMARIUM, VLLM, RAY_LLM])
    options.streams = options.streams or ([1, 8] if options.quick else [1, 8, 32, 256])
    options.engines = options.engines or ([1] if options.quick else [1, 2, 4, 8])
    options.per_engine = options.per_engine or ([4] if options.quick else [2, 5, 10, 20, 30, 40, 50])
    if options.quick:
        options.rounds, options.seconds = 1, QUICK_TOKENS * PERIOD_S
    options.tokens = options.tokens or (QUICK_TOKENS if options.quick else TOKENS)
    if options.stub:
        options.tokens = min(max(QUICK_TOKENS, round(options.seconds / PERIOD_S)), MOST_TOKENS)
        if not {POMARIUM, VLLM}.issuperset(options.sides):
            parser.error("--stub is for pomarium and vllm: Ray Serve LLM is not told of another worker here")
    return options


if __name__ == "__main__":
    main()
