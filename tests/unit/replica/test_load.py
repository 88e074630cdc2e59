"""What a replica tells of its load, from vLLM's statistics of its steps."""

import pytest
from vllm.v1.engine import FinishReason
from vllm.v1.metrics.stats import FinishedRequestStats, IterationStats, PrefixCacheStats, SchedulerStats

from pomarium.cluster.placement.model import Link, Network
from pomarium.cluster.rack.reports import LinkReport, ReplicaReport, StageReport
from pomarium.cluster.replica.reporting import WINDOW_S, Engine, Load, links_of
from pomarium.cluster.replica.slots import Slots
from pomarium.cluster.replica.step_watch import StepWatch

STAGES = tuple(StageReport(mac, first, first + 10, 7, 1 << 30) for mac, first in (("a", 0), ("b", 10), ("b", 20)))
LINKS = (LinkReport("a", "b", 1.25e9, 1e-4),)


class Clock:
    """Seconds that a test says."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def load(clock: Clock) -> Load:
    return Load(StepWatch(1.0), Slots(8, clock=clock), clock)


def step(generated: int, answered: int = 0) -> IterationStats:
    found = IterationStats()
    found.num_generation_tokens = generated
    found.finished_requests = [FinishedRequestStats(FinishReason.STOP)] * answered
    return found


def told(load: Load) -> ReplicaReport:
    return load.report(Engine("m", "r1", 30, STAGES, LINKS), 7.0)


def test_rates_are_of_the_last_seconds_and_the_last_minute(load: Load, clock: Clock) -> None:
    assert (told(load).tokens_per_s, told(load).requests_per_min) == (0.0, 0.0)
    load.record(None, step(30, answered=1))
    clock.now += 1
    load.record(None, step(20, answered=2))
    assert (told(load).tokens_per_s, told(load).requests_per_min) == (50 / WINDOW_S, 3.0)
    clock.now += WINDOW_S - 0.5
    assert told(load).tokens_per_s == 20 / WINDOW_S
    clock.now += WINDOW_S
    assert (told(load).tokens_per_s, told(load).requests_per_min) == (0.0, 3.0)
    clock.now += 60
    assert told(load).requests_per_min == 0.0


def test_queue_and_caches_are_as_the_scheduler_says(load: Load) -> None:
    cache = PrefixCacheStats()
    cache.record(num_tokens=100, num_hits=0, preempted=False)
    load.record(SchedulerStats(3, 2, kv_cache_usage=0.25, prefix_cache_stats=cache), None)
    assert told(load) == ReplicaReport("m", "r1", 30, STAGES, LINKS, 0.0, 3, 2, 0.0, 0.25, 0.0, 7.0)
    cache = PrefixCacheStats()
    cache.record(num_tokens=100, num_hits=80, preempted=False)
    load.record(SchedulerStats(0, 0, prefix_cache_stats=cache), None)
    load.record(SchedulerStats(0, 0), None)  # a step that began no request
    assert (told(load).kv_use, told(load).cached_share, told(load).running) == (0.0, 0.4, 0)


def test_stages_on_different_macs_have_a_link_between_them() -> None:
    assert links_of(STAGES, Network(pairs={frozenset(("b", "a")): Link(1.25e9, 1e-4)})) == LINKS
    assert links_of(STAGES, None) == (LinkReport("a", "b", None, None),)
    assert links_of(STAGES[:1], None) == ()
