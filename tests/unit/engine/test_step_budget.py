"""A step's tokens follow from what steps took: bounds hold whatever was seen, simulated devices stay in time."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pomarium.cluster.engine.scheduling.budget import (
    FIRST_TOKENS,
    GROWTH,
    MIN_TOKENS,
    Demand,
    Limits,
    Prompt,
    level,
    plan,
    target,
)
from pomarium.cluster.executor.step_time import Line, StepTimes, Work, fit, rows_at

TARGET_S = 1.0
GRAIN_S = 0.1
ENGINE = Limits(2048)
NOTHING = Work()
ROOM = 1 << 20

Device = Callable[[Work], float]
"""Seconds of a step."""


def device(fixed: float, row: float, pair: float = 0.0) -> Device:
    return Line(fixed, row, pair).of


@dataclass
class Simulated:
    """An engine on a device, each step planned knowing all but the latest step, as under async scheduling."""

    device: Device
    limits: Limits = ENGINE
    target_s: float = TARGET_S
    times: StepTimes = field(default_factory=lambda: StepTimes(GRAIN_S))
    took: list[float] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    _late: tuple[Work, float] | None = None

    def prompt(self, tokens: int, streams: int = 0, context: int = 100) -> None:
        """A prompt beside `streams` requests that decode."""
        position = 0
        while position < tokens:
            decoding = Work(streams, streams * context)
            demand = Demand(decoding, (Prompt(tokens - position, position),), ROOM)
            budget = plan(demand, self.times, self.limits, self.target_s)
            taken = min(budget.limits.step_tokens - streams, tokens - position)
            taken = min(taken, budget.limits.request_tokens or taken)
            assert taken > 0
            self.step(decoding + rows_at(position, taken))
            position += taken

    def step(self, work: Work) -> None:
        seconds = self.device(work)
        if self._late is not None:
            self.times = self.times.after(*self._late)
        self._late = work, seconds
        self.took.append(seconds)
        self.rows.append(work.rows)


SLOW = {
    "a Mac's CPU": device(0.03, 0.004),
    "a large model": device(0.4, 0.03),
    "long contexts": device(0.02, 0.002, 2e-6),
    "only attention": device(0.001, 1e-5, 4e-6),
    "a slow reader": device(0.9, 0.01),
}


@pytest.mark.parametrize("name", SLOW)
@pytest.mark.parametrize("streams", [0, 8])
def test_steps_stay_in_time(name: str, streams: int) -> None:
    simulated = Simulated(SLOW[name])
    for tokens in (4000, 500, 12_000):
        simulated.prompt(tokens, streams)
    alone = simulated.device(Work(streams, 100 * streams))
    least = max(simulated.device(rows_at(12_000, MIN_TOKENS)) + alone, 0)
    allowed = max(TARGET_S, 2 * alone, least)
    assert max(simulated.took) <= 1.5 * allowed, "the first steps, too"
    assert max(simulated.took[8:]) <= 1.2 * allowed


@pytest.mark.parametrize("name", SLOW)
def test_a_long_prompt_leaves_running_answers_half_their_pace_or_the_gap(name: str) -> None:
    decoding, gap_s = Work(8, 800), 0.1
    simulated = Simulated(SLOW[name], target_s=target(decoding, TARGET_S, gap_s, 1))
    for tokens in (4000, 500, 4000):
        simulated.prompt(tokens, streams=8)
    alone = simulated.device(decoding)
    least = simulated.device(rows_at(4000, MIN_TOKENS)) + alone
    assert max(simulated.took[8:]) <= 1.2 * max(gap_s, 2 * alone, least)


def test_what_a_step_is_to_take_hangs_on_who_waits() -> None:
    assert target(NOTHING, 1.0, 0.1, 1) == 1.0, "nobody reads"
    assert target(Work(3, 90), 1.0, 0.1, 1) == 0.1
    assert target(Work(3, 90), 1.0, 0.1, 4) == 0.025, "a token passes all of them"
    assert target(Work(3, 90), 1.0, 0.0, 1) == 1.0
    assert target(Work(3, 90), 0.05, 0.1, 1) == 0.05


@pytest.mark.parametrize("name", SLOW)
def test_the_time_is_used(name: str) -> None:
    """No more than a few steps beyond what the target makes necessary."""
    simulated = Simulated(SLOW[name])
    simulated.prompt(8000)
    simulated.took.clear()
    simulated.prompt(8000)
    assert sorted(simulated.took)[len(simulated.took) // 2] > 0.7 * TARGET_S


def test_a_fast_device_gets_whole_steps_after_a_few() -> None:
    """An H100's or a Mac's figures; and for good, whatever decodes in between."""
    simulated = Simulated(device(0.01, 5e-5, 1e-9), Limits(8192))
    simulated.prompt(40_000, streams=4)
    assert len([rows for rows in simulated.rows if rows < 8192]) <= 9
    for context in range(5000):
        simulated.step(Work(4, 4 * context))
    simulated.rows.clear()
    simulated.prompt(40_000, streams=4)
    assert simulated.rows == [8192, 8192, 8192, 8192, 40_000 - 4 * 8188 + 4]


def test_long_decoding_does_not_make_a_prompt_look_cheap() -> None:
    simulated = Simulated(device(0.02, 0.004))
    simulated.prompt(4000)
    for context in range(20_000):
        simulated.step(Work(1, context))
    simulated.took.clear()
    simulated.prompt(8000)
    assert max(simulated.took) < 1.2


@pytest.mark.parametrize("seed", range(5))
def test_noise(seed: int) -> None:
    """Times that vary by half; a step in twenty takes three times as long."""
    noise = random.Random(seed)
    slow = SLOW["a Mac's CPU"]

    def noisy(work: Work) -> float:
        return slow(work) * noise.uniform(0.75, 1.25) * (3 if noise.random() < 0.05 else 1)

    simulated = Simulated(noisy)
    simulated.prompt(30_000)
    taken = sorted(simulated.took)
    assert taken[len(taken) * 9 // 10] < 1.5
    assert sum(simulated.took) < 2 * slow(Work(30_000))


def test_a_device_that_becomes_ten_times_slower_and_recovers() -> None:
    simulated = Simulated(device(0.01, 5e-4))
    simulated.prompt(20_000)
    simulated.device = device(0.1, 5e-3)
    simulated.took.clear()
    simulated.prompt(20_000)
    assert max(simulated.took[:2]) > 5, "nobody can know"
    assert max(simulated.took[2:]) < 1.5
    simulated.device = device(0.01, 5e-4)
    simulated.prompt(20_000)
    simulated.took.clear()
    simulated.prompt(20_000)
    assert sum(simulated.took) < 1.3 * 20_000 * 5e-4 + 0.5


def test_one_odd_step_costs_a_few_small_ones() -> None:
    """A kernel that is built in the first step, a machine that slept."""
    simulated = Simulated(device(0.01, 1e-4))
    simulated.step(Work(32, 528, prompts=True))
    simulated.times = simulated.times.after(Work(32, 528, prompts=True), 30.0)
    simulated.prompt(20_000)
    simulated.rows.clear()
    for _ in range(3):
        simulated.prompt(20_000)
    assert sum(rows < 2048 for rows in simulated.rows) <= 40


def test_a_chunk_at_a_long_context_is_smaller() -> None:
    times = StepTimes(GRAIN_S)
    slow = SLOW["long contexts"]
    for position in range(0, 30_000, 500):
        times = times.after(rows_at(position, 100), slow(rows_at(position, 100)))
    sizes = [
        plan(Demand(NOTHING, (Prompt(8000, position),), ROOM), times, ENGINE, TARGET_S).limits.step_tokens
        for position in (0, 3000, 30_000)
    ]
    assert sizes[0] > sizes[1] > sizes[2] >= MIN_TOKENS
    assert slow(rows_at(30_000, sizes[2])) < 1.1


WORKS = st.builds(Work, st.integers(1, 10_000), st.integers(1, 10**9), st.booleans())
HISTORY = st.lists(st.tuples(WORKS, st.floats(0, 1000)), max_size=40)
PROMPTS = st.lists(st.builds(Prompt, st.integers(1, 100_000), st.integers(0, 100_000)), max_size=20)


@given(HISTORY, PROMPTS, st.integers(0, 300), st.integers(300, 20_000), st.integers(0, 3000), st.integers(0, 10**6))
def test_bounds_hold_whatever_was_seen(
    history: list[tuple[Work, float]], prompts: list[Prompt], rows: int, step_tokens: int, each: int, room: int
) -> None:
    times = StepTimes(GRAIN_S)
    for work, seconds in history:
        times = times.after(work, seconds)
    limits = Limits(step_tokens, each)
    budget = plan(Demand(Work(rows, 50 * rows), prompts, room), times, limits, TARGET_S)
    assert budget.limits.step_tokens <= step_tokens
    if not budget.bound:
        assert budget.limits == limits
        return
    tokens = budget.limits.step_tokens - rows
    assert tokens >= MIN_TOKENS
    assert tokens <= max(MIN_TOKENS, GROWTH * times.most_rows or FIRST_TOKENS)
    assert 1 <= budget.limits.request_tokens <= (each or step_tokens)
    assert times.slowness >= 1


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=30), st.integers(1, 10_000))
def test_prompts_share_and_leave_nothing(sizes: list[int], tokens: int) -> None:
    each = level(sizes, tokens)
    taken = sum(min(size, each) for size in sizes)
    assert taken >= min(tokens, sum(sizes))
    assert taken < tokens + len(sizes) or each == 1


def test_a_short_prompt_gets_through_beside_long_ones() -> None:
    times = StepTimes(GRAIN_S)
    for position in range(0, 8000, 1000):
        times = times.after(rows_at(position, 200), 1.0)
    prompts = [Prompt(7900, 2000), Prompt(7900, 7900), Prompt(40, 40)]
    budget = plan(Demand(NOTHING, prompts, ROOM), times, ENGINE, TARGET_S)
    assert budget.limits.step_tokens > 100
    assert budget.limits.request_tokens >= 40
    assert sum(min(prompt.tokens, budget.limits.request_tokens) for prompt in prompts) == pytest.approx(
        budget.limits.step_tokens, abs=3
    )


def test_prompts_that_would_not_fit_the_cache_together_do_not_share() -> None:
    times = StepTimes(GRAIN_S).after(rows_at(0, 200), 1.0)
    prompts = [Prompt(7900, 2000), Prompt(7900, 7900)]
    budget = plan(Demand(NOTHING, prompts, 10_000), times, ENGINE, TARGET_S)
    assert budget.limits.request_tokens == budget.limits.step_tokens


COEFFICIENTS = st.floats(0, 1e-2)


@given(st.floats(0, 1), COEFFICIENTS, st.floats(0, 1e-6), st.integers(0, 2**32))
@example(1.0, 0.0, 0.0, 91)  # the ridge shares 5% out
def test_the_line_is_found(fixed: float, row: float, pair: float, seed: int) -> None:
    true, draw = Line(fixed, row, pair), random.Random(seed)
    works = [rows_at(draw.randrange(30_000), draw.randrange(1, 2000)) for _ in range(40)]
    found = fit([(work, true.of(work), 1.0) for work in works], GRAIN_S)
    assert min(found.fixed, found.row, found.pair) >= 0
    for work in works:
        assert found.of(work) == pytest.approx(true.of(work), rel=0.06, abs=0.01)


def test_without_steps_nothing_is_expected() -> None:
    assert StepTimes(GRAIN_S).seconds(Work(10, 100)) == 0
    first = plan(Demand(NOTHING, [Prompt(5000, 0)], ROOM), StepTimes(GRAIN_S), ENGINE, TARGET_S)
    assert (first.limits.step_tokens, first.bound) == (FIRST_TOKENS, True)
