"""Why no engine answers: what is said of what Serve and a lost engine told."""

import asyncio
import time

import pytest
from ingress_requests import MISSING

from pomarium.cluster import faults
from pomarium.cluster.endpoint import reasons
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.reasons import Reasons


def test_a_controller_that_hangs_holds_one_thread() -> None:
    calls = []

    def hang() -> dict[str, State]:
        calls.append(1)
        time.sleep(1.5)
        return {"engine:m": State("late")}

    async def ask() -> list[str]:
        known = Reasons(hang)
        early = await asyncio.gather(*(known.why("engine:m") for _ in range(5)))
        await asyncio.sleep(1.2)
        return [*early, await known.why("engine:m")]

    answers = asyncio.run(ask())
    assert answers == [reasons.UNKNOWN] * 5 + ["no engine answers; Serve says: late"]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            State("A replica's health check failed. Deploy again.", lost="its worker was killed"),
            "(its worker was killed)",
        ),
        (State("", lost="its worker was killed"), "(its worker was killed)"),
        (State(f"Error:\n{faults.StartError(MISSING)}", lost="its worker was killed"), MISSING),
        (State("has taken more than 30 s to start", lost="its worker was killed"), "(its worker was killed)"),
    ],
)
def test_what_an_engine_was_lost_of_is_told(state: State, expected: str) -> None:
    assert expected in reasons.explain(state, "nothing")
