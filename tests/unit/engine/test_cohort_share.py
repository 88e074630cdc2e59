"""Shares of a step: even as requests come and go, never idle without need, prompts cut, limits kept."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.engine.scheduling.share import (
    MIN_CHUNK_TOKENS,
    Limits,
    Measured,
    Running,
    Waiting,
    chunk,
    cohorts,
    even,
    plan_step,
    round_ms,
    take,
)

SIZES = st.lists(st.integers(0, 20), min_size=1, max_size=6)
ENGINE = Limits(2048, 0, True)
NOBODY = Waiting(0, 0)


def rounds(sizes: Sequence[int], count: int) -> list[int]:
    """What the steps of `count` rounds take if `sizes` were under way and each request is back a round later."""
    ready, *later = sizes
    taken = []
    for _ in range(count * len(sizes)):
        taken.append(take(ready, later))
        later.append(taken[-1])
        ready += later.pop(0) - taken[-1]
    return taken


@given(SIZES)
def test_any_split_is_even_after_one_round_and_stays_so(sizes: list[int]) -> None:
    taken = rounds(sizes, 4)
    for first in range(len(sizes), 3 * len(sizes)):
        assert sorted(taken[first : first + len(sizes)], reverse=True) == list(even(sum(sizes), len(sizes)))


@given(SIZES)
def test_a_step_takes_what_is_ready_up_to_its_share(sizes: list[int]) -> None:
    ready, *later = sizes
    share = take(ready, later)
    assert share <= min(ready, -(-sum(sizes) // len(sizes)))
    assert share >= min(ready, sum(sizes) // len(sizes))
    assert share > 0 or ready == 0


def test_nobody_waits_for_an_evener_split() -> None:
    assert take(1, [0, 0, 0]) == 1
    assert take(2, [1, 1]) == 2
    assert take(2, [2, 0]) == 1


def affine(streams: int, fixed: float, slope: float, link_ms: float, engine_ms: float = 1.0) -> Measured:
    return Measured(streams, lambda tokens: fixed + slope * tokens, link_ms, engine_ms)


@given(st.integers(1, 30), st.floats(0, 30), st.floats(0, 3), st.floats(0, 10), st.floats(0, 5))
def test_a_round_takes_as_long_as_the_steps_of_a_pipeline(
    streams: int, fixed: float, slope: float, link: float, engine: float
) -> None:
    measured = affine(streams, fixed, slope, link, engine)
    for stages in range(1, 6):
        for count in (stages, stages + 1):
            predicted = round_ms(stages, count, measured)
            assert simulated_round_ms(stages, count, measured) == pytest.approx(predicted, abs=1e-6)


def simulated_round_ms(stages: int, cohorts: int, measured: Measured, count: int = 40) -> float:
    """Cohorts one after another through the stages, each again when its tokens are back at the first."""
    sizes, link = even(measured.streams, cohorts), measured.link_ms
    free, back = [0.0] * stages, [0.0] * len(sizes)
    ends = []
    for _ in range(count):
        for cohort, size in enumerate(sizes):
            if not size:
                continue
            time = back[cohort]
            for stage in range(stages):
                free[stage] = time = max(time, free[stage]) + measured.step_ms(size)
                time += link
            back[cohort] = time + (measured.engine_ms + link if cohorts > stages else 0.0)
        ends.append(time)
    return (ends[-1] - ends[count // 2]) / (count - 1 - count // 2)


def test_cohorts_are_the_stages_unless_links_are_slow_and_streams_many() -> None:
    assert [cohorts(stages) for stages in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert cohorts(4, affine(16, 12, 1, link_ms=0.3)) == 4
    assert cohorts(4, affine(16, 20, 0, link_ms=5.0)) == 4
    assert cohorts(4, affine(20, 12, 1, link_ms=6.0)) == 4
    assert cohorts(4, affine(64, 12, 1, link_ms=6.0)) == 5


@given(st.integers(1, 5000), st.integers(1, 6), st.integers(1, 4096))
def test_prompts_are_cut_so_that_a_round_of_steps_takes_them(tokens: int, count: int, limit: int) -> None:
    share = chunk(tokens, count, limit)
    assert share <= limit
    assert share * count >= tokens or share == limit
    assert share <= max(MIN_CHUNK_TOKENS, -(-tokens // count))


@st.composite
def states(draw: st.DrawFn) -> tuple[int, int, list[Running], Waiting, Limits]:
    """A step number, cohorts, and what runs and waits then."""
    step, count = draw(st.integers(6, 20)), draw(st.integers(2, 5))
    running = []
    for index in range(draw(st.integers(0, 12))):
        prefilling, in_flight = draw(st.booleans()), draw(st.booleans())
        served = draw(st.integers(step - count if in_flight else 0, step - 1))
        tokens = draw(st.integers(1, 3000)) if prefilling else draw(st.integers(0 if in_flight else 1, 1))
        running.append(Running(str(index), tokens, prefilling, served, in_flight))
    requests = draw(st.integers(0, 10))
    waiting = Waiting(requests, draw(st.integers(requests, 5000)) if requests else 0)
    limits = Limits(draw(st.integers(32, 2048)), draw(st.sampled_from([0, 16, 500])), draw(st.booleans()))
    return step, count, running, waiting, limits


@given(states())
def test_no_token_is_needed_before_a_round_is_over(state: tuple[int, int, list[Running], Waiting, Limits]) -> None:
    step, count, running, waiting, limits = state
    plan = plan_step(step, count, running, waiting, limits)
    for request in running:
        if request.id in plan.ids and not request.prefilling:
            assert request.tokens > 0
            assert not request.in_flight or step - request.served >= count


@given(states())
def test_a_plan_keeps_the_engines_limits_and_leaves_nobody_out(
    state: tuple[int, int, list[Running], Waiting, Limits],
) -> None:
    step, count, running, waiting, limits = state
    plan = plan_step(step, count, running, waiting, limits)
    decoding = [request for request in running if request.id in plan.ids and not request.prefilling]
    prompts = [request for request in running if request.prefilling]
    assert plan.limits.step_tokens <= limits.step_tokens
    assert 0 <= plan.admitted <= waiting.requests
    assert plan.limits.chunked == limits.chunked
    if limits.request_tokens:
        assert plan.limits.request_tokens <= limits.request_tokens
    if limits.chunked:
        assert plan.limits.step_tokens >= min(limits.step_tokens, len(decoding) + 1)
    else:
        assert plan.limits == limits
    taken = [request.id in plan.ids for request in prompts]
    assert taken == sorted(taken, reverse=True)
    if prompts and len(decoding) < limits.step_tokens:
        assert taken[0]
    able = [r for r in running if r.tokens and not (r.in_flight and step - r.served < count)]
    assert plan.ids or plan.admitted or not (able or waiting.requests)


def test_the_longest_unserved_go_first() -> None:
    running = [Running(str(served), 1, False, served, False) for served in (3, 1, 4, 2)]
    assert plan_step(9, 2, running, NOBODY, ENGINE).ids == {"1", "2"}


def test_requests_that_wait_in_vain_do_not_spoil_the_balance() -> None:
    """Six requests run and ten that find no memory wait: the six are still halved."""
    running = [Running(str(index), 1, False, 1, False) for index in range(6)]
    plan = plan_step(9, 2, running, Waiting(10, 40), ENGINE)
    assert (len(plan.ids), plan.admitted) == (3, 5)


def test_a_prompt_goes_beside_every_cohort_in_equal_parts() -> None:
    running = [Running(str(index), 1, False, 8 - index, True) for index in range(1, 4)]
    running.append(Running("prompt", 1500, True, 0, True))
    plan = plan_step(9, 4, running, NOBODY, ENGINE)
    assert plan.ids == {"3", "prompt"}
    assert plan.limits == Limits(1 + 375, 375, True)


def test_prompts_after_the_one_that_fills_a_step_wait() -> None:
    running = [Running(str(index), 1000, True, 0, True) for index in range(3)]
    assert plan_step(9, 2, running, NOBODY, ENGINE).ids == {"0", "1"}
    assert plan_step(9, 2, running, NOBODY, Limits(1000, 0, True)).ids == {"0"}
