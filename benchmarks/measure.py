"""What is measured, over the small interface of a system: prompts in, tokens and their times out.

    System --throughput, first_token, gaps--> Sample (one figure)     Samples of all rounds --report--> tables

The interface has two halves because a peer may have only one of them: `Offline` takes a batch and returns when all is
done, `Streaming` gives each token when it comes. Loading and one warm-up call precede everything that is timed.
"""

import asyncio
import itertools
import math
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import psutil
from prompts import Prompt, Prompts

PROMPT_TOKENS, OUTPUT_TOKENS = 128, 64
PREFIX_TOKENS, SUFFIX_TOKENS = 1024, 32
GAP_STREAMS, LONG_PROMPT_TOKENS = 8, 2048
WARM_UP_OUTPUT = 4


class Offline(Protocol):
    """A system that completes a batch."""

    def complete(self, prompts: Sequence[Prompt], tokens: int) -> int:
        """Generate `tokens` tokens for each prompt, all at once, greedily; returns how many were generated."""
        ...


class Streaming(Protocol):
    """A system that streams."""

    def stream(self, prompt: Prompt, tokens: int) -> AsyncIterator[None]:
        """One item for each token (or piece of text) as it arrives."""
        ...


@dataclass(frozen=True)
class Sample:
    """One figure of one round.

    Attributes:
        measure: what, for example "throughput/8". value: tokens per second, seconds or bytes, as `measure` says.
        others: cores that processes other than the system's kept busy meanwhile.
    """

    measure: str
    value: float
    others: float = 0.0


class Load:
    """Processor time of this process' tree and of everybody else, since it was made."""

    def __init__(self) -> None:
        self._start = self._now()

    def others(self) -> float:
        """Cores in use by processes outside this one's tree; about 0.05 is the system itself."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall > 0 else 0.0

    def own(self) -> float:
        """Seconds of processor time of this process and its descendants."""
        return self._now()[2] - self._start[2]

    @staticmethod
    def _now() -> tuple[float, float, float]:
        times = psutil.cpu_times()._asdict()
        # Linux counts guest time in user time, too.
        busy = sum(value for name, value in times.items() if name not in ("idle", "iowait", "guest", "guest_nice"))
        own = 0.0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            own += used.user + used.system
        return time.monotonic(), busy, own


def wait_for_quiet(limit_s: float, cores: float = 0.3) -> float:
    """Wait until other processes use at most `cores` for two seconds, at most `limit_s`; returns the seconds waited."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        load = Load()
        time.sleep(2)
        if load.others() <= cores:
            break
    return time.monotonic() - began


def warm_up(system: Offline, prompts: Prompts) -> None:
    """One short call of two prompts."""
    system.complete([prompts.make(PROMPT_TOKENS) for _ in range(2)], WARM_UP_OUTPUT)


def throughput(system: Offline, prompts: Prompts, streams: int, output: int) -> list[Sample]:
    """Generated tokens over wall time, and over the system's own processor time, prompt processing included.

    The second says what the first would be nearer to on a machine of one's own: with one thread it hardly depends on
    what other programs take.

    Raises:
        RuntimeError: if the system did not generate all of them.
    """
    batch = [prompts.make(PROMPT_TOKENS) for _ in range(streams)]
    load, began = Load(), time.perf_counter()
    generated = system.complete(batch, output)
    seconds = time.perf_counter() - began
    if generated != streams * output:
        raise RuntimeError(f"{generated} tokens were generated instead of {streams * output}")
    others = load.others()
    return [
        Sample(f"throughput/{streams}", generated / seconds, others),
        Sample(f"per_cpu_second/{streams}", generated / load.own(), others),
    ]


def first_token(system: Offline, prompts: Prompts) -> list[Sample]:
    """Seconds to the first token of a prompt that is unknown, and of one whose first part was served before."""
    prefix = prompts.make(PREFIX_TOKENS)
    samples = []
    for name in ("cold", "hit"):
        prompt = prompts.make(PREFIX_TOKENS + SUFFIX_TOKENS, prefix)
        load, began = Load(), time.perf_counter()
        system.complete([prompt], 1)
        samples.append(Sample(f"first_token/{name}", time.perf_counter() - began, load.others()))
    return samples


async def gaps(system: Streaming, prompts: Prompts, output: int) -> list[Sample]:
    """Median gap between tokens of running streams, the worst one while a long prompt arrives, its time to first token.

    Every stream has a few tokens before the long prompt is sent. The gap that is open when its first token comes
    counts until it ends.
    """
    arrivals: list[list[float]] = [[] for _ in range(GAP_STREAMS)]

    async def run(times: list[float], prompt: Prompt) -> None:
        async for _ in system.stream(prompt, output):
            times.append(time.perf_counter())

    load = Load()
    running = [asyncio.create_task(run(times, prompts.make(PROMPT_TOKENS))) for times in arrivals]
    while min(len(times) for times in arrivals) < output // 4:
        if failed := [task for task in running if task.done()]:
            await failed[0]
            raise RuntimeError("a stream ended before the long prompt arrived")
        await asyncio.sleep(0.01)
    sent = time.perf_counter()
    async for _ in system.stream(prompts.make(LONG_PROMPT_TOKENS), 1):
        pass
    answered = time.perf_counter()
    await asyncio.gather(*running)
    load_meanwhile = load.others()
    return [
        Sample("gap/before", percentile(gaps_of(arrivals, 0.0, sent), 0.5), load_meanwhile),
        Sample("gap/during", max(gaps_of(arrivals, sent, answered)), load_meanwhile),
        Sample("gap/first_token", answered - sent, load_meanwhile),
    ]


def gaps_of(arrivals: Sequence[Sequence[float]], since: float, until: float) -> list[float]:
    """Times between two successive arrivals of one stream, of the gaps that overlap the open interval."""
    return [
        after - before
        for times in arrivals
        for before, after in itertools.pairwise(times)
        if after > since and before < until
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them, in (0, 1], do not exceed (nearest rank).

    Raises:
        ValueError: without values, or if `share` is out of range.
    """
    if not values or not 0 < share <= 1:
        raise ValueError("percentile() wants values and a share in (0, 1]")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def mebibytes(count: float) -> int:
    """Bytes as MiB, rounded."""
    return round(count / (1 << 20))
