"""What a replica tells of itself while it lives: its stages, and how busy it is, for `pomarium rack status`.

    vLLM's statistics of each step --Load.record--> Load --every REPORT_S--> rack.reports.publish

Only replicas import this module, since it imports vLLM.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from ray.exceptions import RayError
from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

from pomarium.cluster.executor.member import Member
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.reports import ReplicaReport, StageReport
from pomarium.cluster.replica.step_watch import StepWatch

logger = logging.getLogger(__name__)

REPORT_S = 2.0
WINDOW_S = 5.0
"""Tokens per second are counted over so long."""


class Load:
    """Listens to an engine as one of vLLM's stat loggers (vllm/v1/metrics/loggers.py, AggregateStatLoggerBase).

    Attributes:
        steps: told of each step's end.
    """

    def __init__(self, steps: StepWatch) -> None:
        self.steps = steps
        self.running = 0
        self.waiting = 0
        self._tokens: deque[tuple[float, int]] = deque()

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        """One step's figures."""
        self.steps.ended(time.monotonic())
        if scheduler_stats is not None:
            self.running, self.waiting = scheduler_stats.num_running_reqs, scheduler_stats.num_waiting_reqs
        if iteration_stats is not None and iteration_stats.num_generation_tokens:
            self._tokens.append((time.monotonic(), iteration_stats.num_generation_tokens))

    def log(self) -> None:
        """Nothing to print."""

    def log_engine_initialized(self) -> None:
        """Nothing to print."""

    def record_sleep_state(self, is_awake: int = 0, level: int = 0) -> None:
        """There is no sleep mode."""

    def tokens_per_s(self) -> float:
        """Generated over the last WINDOW_S seconds."""
        since = time.monotonic() - WINDOW_S
        while self._tokens and self._tokens[0][0] < since:
            self._tokens.popleft()
        return sum(count for _, count in self._tokens) / WINDOW_S


def stages_of(members: Sequence[Member], layers: int, memory: Sequence[int]) -> tuple[StageReport, ...]:
    """The stages of `members`, which run a model of `layers`. memory: bytes that each worker holds, by rank."""
    return tuple(
        StageReport(member.mac, *(member.layers or (0, layers)), member.contact.endpoint.pid, held)
        for member, held in zip(members, memory, strict=True)
    )


async def report(model: str, replica: str, layers: int, stages: tuple[StageReport, ...], load: Load) -> None:
    """Publish for ever. A head that does not answer is tried again: whoever runs without one has other worries."""
    while True:
        now = time.time()
        told = ReplicaReport(model, replica, layers, stages, load.tokens_per_s(), load.running, load.waiting, now)
        try:
            await asyncio.to_thread(reports.publish, told)
        except RayError:
            logger.warning("The replica's report did not reach the rack's head.", exc_info=True)
        await asyncio.sleep(REPORT_S)
