"""The decisions of cluster/autoscaling/policy.py, held to their definitions over arbitrary days."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.autoscaling import policy as rules
from pomarium.cluster.autoscaling.policy import DAY, Recent, ReplicaPolicy, Sleeper, Tries, WakePolicy

MINUTES = st.integers(0, DAY - 1)
SPANS = st.lists(st.tuples(MINUTES, st.integers(0, DAY)), max_size=4)
ONGOING = st.one_of(st.just(0.0), st.integers(1, 5000).map(float), st.floats(0.01, 1e6))
STEPS = st.lists(st.tuples(st.sampled_from([0.1, 1.0, 7.0, 60.0, 500.0]), ONGOING), min_size=1, max_size=60)


@st.composite
def policies(draw: st.DrawFn) -> ReplicaPolicy:
    maximum = draw(st.integers(1, 40))
    return ReplicaPolicy(
        draw(st.integers(0, maximum)),
        maximum,
        draw(st.floats(0.1, 64)),
        draw(st.sampled_from([0.0, 1.0, 60.0, 600.0])),
        draw(st.sampled_from([0.0, 0.1, 0.25, 0.9])),
    )


def played(policy: ReplicaPolicy, steps: list[tuple[float, float]]) -> list[tuple[float, float, int, Recent]]:
    """(now, ongoing, wanted, remembered) of each call."""
    now, recent, found = 1e9, Recent(), []
    for gap, ongoing in steps:
        now += gap
        count, recent = rules.wanted(policy, ongoing, now, recent)
        found.append((now, ongoing, count, recent))
    return found


@given(policies(), STEPS)
def test_wanted_is_the_highest_need_within_keep_s(policy: ReplicaPolicy, steps: list[tuple[float, float]]) -> None:
    calls = played(policy, steps)
    for index, (now, _, count, recent) in enumerate(calls):
        past = [(at, ongoing) for at, ongoing, _, _ in calls[: index + 1]]
        needs = [rules.needed(policy, ongoing) for at, ongoing in past if at == now or now - at < policy.keep_s]
        assert count == max(needs)
        assert policy.minimum <= count <= policy.maximum
        assert len(recent.needs) <= policy.maximum + 1
        assert Recent.from_dict(json.loads(json.dumps(recent.to_dict()))) == recent


@given(policies(), STEPS)
def test_never_to_zero_within_keep_s_of_a_request(policy: ReplicaPolicy, steps: list[tuple[float, float]]) -> None:
    asked = -math.inf
    for now, ongoing, count, _ in played(replace(policy, minimum=0), steps):
        asked = now if ongoing > 0 else asked
        assert (count > 0) == (now == asked or now - asked < policy.keep_s)


@given(policies(), STEPS, st.floats(0, 100))
def test_more_demand_never_wants_fewer(policy: ReplicaPolicy, steps: list[tuple[float, float]], more: float) -> None:
    heavier = [(gap, ongoing + more) for gap, ongoing in steps]
    pairs = zip(played(policy, steps), played(policy, heavier), strict=True)
    assert all(less[2] <= greater[2] for less, greater in pairs)


@given(policies(), ONGOING)
def test_what_is_wanted_takes_the_requests_and_one_less_would_not(policy: ReplicaPolicy, ongoing: float) -> None:
    count = rules.needed(replace(policy, minimum=0), ongoing)
    most = policy.target * (1 - policy.headroom)
    if ongoing == 0:
        assert count == 0
    elif ongoing <= 1:
        assert count == 1
    elif count < policy.maximum:
        assert count * most >= ongoing * (1 - 1e-6)
    assert count <= 1 or (count - 1) * most < ongoing


@given(st.floats(0, 0.99), st.floats(0.001, 64), st.floats(0.001, 1))
def test_one_request_wakes_for_one_replica(headroom: float, target: float, ongoing: float) -> None:
    policy = ReplicaPolicy(0, 9, target, 60, headroom)
    assert rules.wanted(policy, ongoing, 0, Recent())[0] == 1


@pytest.mark.parametrize(
    ("ongoing", "headroom", "replicas"),
    [(8, 0, 1), (8.1, 0, 2), (6, 0.25, 1), (7, 0.25, 2), (12, 0.25, 2), (13, 0.25, 3), (math.inf, 0, 10)],
)
def test_headroom_is_the_share_kept_free(ongoing: float, headroom: float, replicas: int) -> None:
    assert rules.needed(ReplicaPolicy(0, 10, 8, 60, headroom), ongoing) == replicas


def test_thirds_of_a_tenth_are_not_rounded_up() -> None:
    assert rules.needed(ReplicaPolicy(0, 10, 0.7, 60, 0), 2.1) == 3


def test_down_by_steps_as_each_need_gets_old() -> None:
    policy = ReplicaPolicy(0, 9, 1, 100, 0)
    recent = Recent()
    counts = []
    for now, ongoing in ((0, 3), (50, 2), (99, 0), (100, 0), (149, 0), (150, 0), (151, 1), (152, 0)):
        count, recent = rules.wanted(policy, ongoing, now, recent)
        counts.append(count)
    assert counts == [3, 3, 3, 2, 2, 0, 1, 1]


def test_a_clock_set_back_keeps_no_longer_than_keep_s() -> None:
    policy = ReplicaPolicy(0, 9, 1, 100, 0)
    _, recent = rules.wanted(policy, 5, 10_000, Recent())
    count, recent = rules.wanted(policy, 0, 10, recent)
    assert count == 5
    count, recent = rules.wanted(policy, 0, 109, recent)
    assert count == 5
    assert rules.wanted(policy, 0, 110, recent)[0] == 0


def test_a_lower_maximum_holds_at_once() -> None:
    _, recent = rules.wanted(ReplicaPolicy(0, 9, 1, 100, 0), 9, 0, Recent())
    assert rules.wanted(ReplicaPolicy(0, 4, 1, 100, 0), 0, 1, recent)[0] == 4


def test_replicas_that_are_found_are_kept_as_if_needed() -> None:
    policy = ReplicaPolicy(0, 9, 1, 100, 0)
    recent = rules.remembering(3, 50)
    assert rules.wanted(policy, 0, 149, recent)[0] == 3
    assert rules.wanted(policy, 0, 150, recent)[0] == 0


def test_state_of_others_is_let_be_and_rubbish_is_refused() -> None:
    assert Recent.from_dict({"decision_counter": 3}) == Recent()
    for rubbish in (7, [7], [["a", 1.0]], [[1, 2.0, 3.0]], "no"):
        with pytest.raises(ValueError, match="need"):
            Recent.from_dict({"needs": rubbish})


@pytest.mark.parametrize(
    "changed",
    [{"minimum": -1}, {"minimum": 5}, {"target": 0.0}, {"target": math.nan}, {"keep_s": -1.0}, {"headroom": 1.0}],
)
def test_figures_out_of_range_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="not"):
        replace(ReplicaPolicy(0, 4, 1, 60, 0), **changed)


def test_a_demand_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="nan"):
        rules.wanted(ReplicaPolicy(0, 4, 1, 60, 0), math.nan, 0, Recent())


@given(st.integers(1, 3000), st.floats(0, 1e9), st.floats(0.1, 1e3), st.floats(1, 1e4))
def test_pauses_grow_up_to_the_longest(failures: int, now: float, first: float, times: float) -> None:
    policy = WakePolicy(first_pause_s=first, longest_pause_s=first * times)
    before = rules.failed(Tries(failures - 1), now, policy)
    after = rules.failed(Tries(failures), now, policy)
    assert (before.failures, after.failures) == (failures, failures + 1)
    assert now < before.not_before <= after.not_before <= now + policy.longest_pause_s
    assert rules.woke(after) == Tries()


def test_pauses_double() -> None:
    tries, pauses = Tries(), []
    for _ in range(8):
        tries = rules.failed(tries, 1000.0, WakePolicy())
        pauses.append(tries.not_before - 1000)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600]


def test_a_wake_is_overdue_at_its_deadline() -> None:
    policy = WakePolicy(deadline_s=5)
    assert [rules.overdue(100, now, policy) for now in (99, 104.9, 105, 106)] == [False, False, True, True]


@given(st.lists(st.builds(Sleeper, st.text(max_size=3), st.integers(0, 3), st.integers(0, 9)), max_size=9))
def test_wake_order_is_a_permutation_with_those_that_failed_last(macs: list[Sleeper]) -> None:
    order = rules.wake_order(macs)
    assert sorted(order) == sorted(mac.name for mac in macs)
    assert order == rules.wake_order(list(reversed(macs)))
    by_name = {mac.name: mac for mac in macs}
    if len(by_name) == len(macs):
        keys = [(by_name[name].failures, by_name[name].wakes, name) for name in order]
        assert keys == sorted(keys)


@pytest.mark.parametrize(
    ("span", "inside", "outside"),
    [
        ((60, 120), (60, 119), (59, 120)),
        ((22 * 60, 6 * 60), (22 * 60, DAY - 1, 0, 359), (360, 22 * 60 - 1)),
        ((22 * 60, DAY), (22 * 60, DAY - 1), (0, 22 * 60 - 1)),
        ((0, DAY), (0, 700, DAY - 1), ()),
        ((300, 300), (0, 299, 300, DAY - 1), ()),
    ],
)
def test_quiet_hours(span: tuple[int, int], inside: tuple[int, ...], outside: tuple[int, ...]) -> None:
    assert all(rules.quiet([span], minute) for minute in inside)
    assert not any(rules.quiet([span], minute) for minute in outside)


@given(SPANS, MINUTES)
def test_quiet_is_membership_minute_by_minute(spans: list[tuple[int, int]], minute: int) -> None:
    minutes: set[int] = set()
    for begin, end in spans:
        length = end - begin if end > begin else end - begin + DAY
        minutes.update(number % DAY for number in range(begin, begin + length))
    assert rules.quiet(spans, minute) == (minute in minutes)


@given(SPANS, MINUTES)
def test_quiet_ends_at_the_first_minute_outside(spans: list[tuple[int, int]], minute: int) -> None:
    ahead = rules.quiet_ends(spans, minute)
    assert all(rules.quiet(spans, (minute + number) % DAY) for number in range(ahead))
    assert ahead == DAY or not rules.quiet(spans, (minute + ahead) % DAY)


def test_spans_that_touch_end_together() -> None:
    assert rules.quiet_ends([(22 * 60, DAY), (0, 360)], 23 * 60) == 7 * 60
    assert rules.quiet_ends([], 5) == 0
    assert rules.quiet_ends([(9, 9)], 5) == DAY
