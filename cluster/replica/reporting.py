"""What a replica tells of itself while it lives: its stages, and how busy it is, for `pomarium rack status`.

    vLLM's statistics of each step --Load.record--> Load --every REPORT_S--> rack.reports.publish

Only replicas import this module, since it imports vLLM.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ray.exceptions import RayError
from vllm.v1.metrics.stats import CachingMetrics, IterationStats, MultiModalCacheStats, SchedulerStats

from pomarium.cluster.executor.member import Member
from pomarium.cluster.placement.model import Network
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.reports import LinkReport, ReplicaReport, StageReport
from pomarium.cluster.replica.slots import Slots
from pomarium.cluster.replica.step_watch import StepWatch

logger = logging.getLogger(__name__)

REPORT_S = 2.0
WINDOW_S = 5.0
"""Tokens per second are counted over so long."""
MINUTE_S = 60.0


class Recent:
    """A count of what happened in the last `window_s` seconds of `clock`."""

    def __init__(self, window_s: float, clock: Callable[[], float]) -> None:
        self._window_s, self._clock = window_s, clock
        self._counts: deque[tuple[float, int]] = deque()

    def add(self, count: int) -> None:
        """So many, now."""
        self._counts.append((self._clock(), count))

    @property
    def total(self) -> int:
        """Of the window that ends now."""
        since = self._clock() - self._window_s
        while self._counts and self._counts[0][0] < since:
            self._counts.popleft()
        return sum(count for _, count in self._counts)


class Load:
    """Listens to an engine as one of vLLM's stat loggers (vllm/v1/metrics/loggers.py, AggregateStatLoggerBase).

    Attributes:
        steps, slots: told of each step's end.
        running, waiting, kv_use: as of a ReplicaReport.
    """

    def __init__(self, steps: StepWatch, slots: Slots, clock: Callable[[], float] = time.monotonic) -> None:
        self.steps, self.slots = steps, slots
        self.running = 0
        self.waiting = 0
        self.kv_use = 0.0
        self._clock = clock
        self._tokens, self._answered = Recent(WINDOW_S, clock), Recent(MINUTE_S, clock)
        self._cache = CachingMetrics()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """One step's figures."""
        self.steps.ended(self._clock())
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
            self.kv_use = scheduler_stats.kv_cache_usage
            self._cache.observe(scheduler_stats.prefix_cache_stats)
        if iteration_stats is not None and iteration_stats.num_generation_tokens:
            self._tokens.add(iteration_stats.num_generation_tokens)
        self.slots.ended(
            self.running, self.waiting, 0 if iteration_stats is None else iteration_stats.num_generation_tokens
        )
        if iteration_stats is not None and iteration_stats.finished_requests:
            self._answered.add(len(iteration_stats.finished_requests))

    def log(self) -> None:
        """Nothing to print."""

    def log_engine_initialized(self) -> None:
        """Nothing to print."""

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """There is no sleep mode."""

    def tokens_per_s(self) -> float:
        """Generated over the last WINDOW_S seconds."""
        return self._tokens.total / WINDOW_S

    def report(self, engine: "Engine", written: float) -> ReplicaReport:
        """What the engine does now. written: Unix time, seconds."""
        return ReplicaReport(
            engine.model,
            engine.replica,
            engine.layers,
            engine.stages,
            engine.links,
            tokens_per_s=self.tokens_per_s(),
            running=self.running,
            waiting=self.waiting,
            requests_per_min=float(self._answered.total),
            kv_use=self.kv_use,
            cached_share=float(self._cache.hit_rate),
            written=written,
            least_macs=engine.least_macs,
        )


def stages_of(members: Sequence[Member], layers: int, memory: Sequence[int]) -> tuple[StageReport, ...]:
    """The stages of `members`, which run a model of `layers`. memory: bytes that each worker holds, by rank."""
    return tuple(
        StageReport(member.mac, *(member.layers or (0, layers)), member.contact.endpoint.pid, held)
        for member, held in zip(members, memory, strict=True)
    )


def links_of(stages: Sequence[StageReport], network: Network | None) -> tuple[LinkReport, ...]:
    """The links that the stages hand on over. network: between the Macs; None where nothing is known of it."""
    found = []
    for one, other in pairwise(stage.mac for stage in stages):
        link = None if network is None else network.pairs.get(frozenset((one, other)), network.default)
        if one != other:
            facts = (None, None) if link is None else (link.bandwidth, link.latency)
            found.append(LinkReport(one, other, *facts))
    return tuple(found)


@dataclass(frozen=True)
class Engine:
    """What of a ReplicaReport stays as it is while the engine lives."""

    model: str
    replica: str
    layers: int
    stages: tuple[StageReport, ...]
    links: tuple[LinkReport, ...]
    least_macs: int = 1


async def report(engine: Engine, load: Load) -> None:
    """Publish for ever. A head that does not answer is tried again: whoever runs without one has other worries."""
    while True:
        try:
            await asyncio.to_thread(reports.publish, load.report(engine, time.time()))
        except RayError:
            logger.warning("The replica's report did not reach the rack's head.", exc_info=True)
        await asyncio.sleep(REPORT_S)
