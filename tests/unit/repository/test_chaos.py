"""What benchmarks/chaos.py draws, and what it takes for an answer; the rack it strikes is run by hand (make chaos)."""

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    from chaos_table import Kind, Round, Verdict, draw, table, verdict
finally:
    sys.path.remove(str(BENCHMARKS))

TEXT: dict[str, Any] = {"": {"choices": {0: {"text": "Paris", "logprob": -0.5, "finish_reason": ["length"]}}}}


@given(st.integers(0, 1 << 40), st.integers(0, 60))
def test_a_seed_gives_the_same_strikes_and_all_kinds_in_turns(seed: int, count: int) -> None:
    strikes = draw(seed, count)
    assert strikes == draw(seed, count)
    assert len(strikes) == count
    assert all(0 <= strike.engine < 1 for strike in strikes)
    whole = strikes[: count - count % len(Kind)]
    assert all(sum(strike.kind is kind for strike in whole) == count // len(Kind) for kind in Kind)


def test_other_seeds_give_others() -> None:
    assert draw(1, 20) != draw(2, 20)
    assert {strike.kind for strike in draw(1, 5, (Kind.MAC_KILLED,))} == {Kind.MAC_KILLED}


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (TEXT, Verdict.ANSWERED),
        (
            {"": {"choices": {0: {"text": "Paris", "logprob": -0.5000001, "finish_reason": ["length"]}}}},
            Verdict.ANSWERED,
        ),
        ({"": {"choices": {0: {"text": "Pa", "logprob": -0.5, "finish_reason": ["length"]}}}}, Verdict.WRONG),
        ({"": {"choices": {0: {"text": "Paris", "logprob": -0.6, "finish_reason": ["length"]}}}}, Verdict.WRONG),
        ({"": {"choices": {0: {"text": "Pa"}}, "error": {"message": "its worker was lost"}}}, Verdict.REFUSED),
        ({"": {"choices": {0: {"text": "Pa"}}}}, Verdict.WRONG),
        ({"fault": "None", "status": 503, "events": [{"error": {"message": "no engine"}}]}, Verdict.REFUSED),
        ({"fault": "None", "status": 500, "events": [{"error": {"message": "?"}}]}, Verdict.WRONG),
        ({"fault": "ReadError('')", "status": 200, "events": []}, Verdict.CUT),
    ],
)
def test_what_becomes_of_a_request(answer: dict[str, Any], found: Verdict) -> None:
    assert verdict(answer, TEXT) is found


def test_only_an_ingress_may_cut_and_nothing_may_be_wrong_or_hang() -> None:
    for kind in Kind:
        assert Round(kind, (Verdict.ANSWERED, Verdict.REFUSED), 1.0).faultless
        assert not Round(kind, (Verdict.WRONG,), 1.0).faultless
        assert not Round(kind, (Verdict.HUNG,), 1.0).faultless
        assert Round(kind, (Verdict.CUT,), 1.0).faultless is (kind is Kind.INGRESS_KILLED)


def test_the_table_counts() -> None:
    answered = (Verdict.ANSWERED, Verdict.ANSWERED)
    rounds = [Round(Kind.MAC_KILLED, answered, 3.0), Round(Kind.MAC_KILLED, (Verdict.REFUSED, *answered), 9.0)]
    assert table(rounds)[2:] == [
        "| Mac killed | 2 | 5 | 4 | 1 | 0 | 0 | 0 | 3 s | 9 s |",
        "| all | 2 | 5 | 4 | 1 | 0 | 0 | 0 | 3 s | 9 s |",
    ]
