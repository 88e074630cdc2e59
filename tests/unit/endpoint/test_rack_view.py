"""What /v1/rack tells of the rack and the models, and how often the rack's head is asked for it."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from idle_ingress import GIB, SERVES, asked
from ray.exceptions import RpcError

from pomarium.cluster import faults
from pomarium.cluster.endpoint import rack_view, reasons
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.rack_view import RackView, model_state
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.rack import status
from pomarium.cluster.rack.serve_actors import ENGINE, ServeActor
from pomarium.cluster.rack.status import RackStatus
from pomarium.worker.errors import SettingsError

EMPTY = replace(SERVES, replicas=())
MISSING = "model needs 12.3 GiB more memory: add a Mac"
START_FAILED = f"A replica failed to start with exception. Error:\n{faults.StartError(MISSING)}\n"


@pytest.mark.parametrize(
    ("sleeps", "known", "found", "state", "reason"),
    [
        (False, State(running=1), SERVES, "serving", None),
        (False, State(running=1), EMPTY, "serving", None),  # vLLM's own backend reports nothing
        (False, State(), EMPTY, "starting", reasons.UNKNOWN),
        (False, State("Deploying."), EMPTY, "starting", "no engine answers; Serve says: Deploying."),
        (True, State(), EMPTY, "asleep", None),
        (
            True,
            State(str(faults.StartError("2 Macs wake.")), waiting=True, waking=True),
            EMPTY,
            "waking",
            "2 Macs wake.",
        ),
        (False, State(str(faults.StartError("2 stages.")), waiting=True), EMPTY, "waiting", "2 stages."),
        (False, State(str(faults.StartError("2 stages.")), 1, waiting=True), SERVES, "serving", "2 stages."),
        (False, State(START_FAILED), EMPTY, "failed", MISSING),
        (False, State(lost="it was killed"), EMPTY, "lost", f"{reasons.LOST} (it was killed); {reasons.ANOTHER}"),
        (False, State(lost="it was killed"), SERVES, "serving", None),
    ],
)
def test_a_model_has_one_state_and_its_reason(
    sleeps: bool, known: State, found: RackStatus, state: str, reason: str | None
) -> None:
    told = model_state("m", sleeps, known, found)
    assert (told.name, told.state, told.reason) == ("m", state, reason)


def test_an_engine_whose_process_has_ended_does_not_serve() -> None:
    """Its report is seconds old, and Serve has not noticed yet."""
    ended = replace(SERVES, actors=(ServeActor(ENGINE, "engine:m", "r1", end="it was killed"),))
    assert model_state("m", False, State(lost="it was killed"), ended).state == "lost"


def test_the_document_is_that_of_rack_status_with_the_models_beside_it() -> None:
    found = rack_view.document(SERVES, [model_state("m", False, State(), SERVES)])
    assert found.pop("models") == [{"name": "m", "state": "serving", "reason": None}]
    assert found == status.document(SERVES)
    assert (found["at"], found["macs"][0]["stages"][0]["memory"]) == (1000.0, GIB)


# --- how it is read --------------------------------------------------------------------------------------------------


def test_many_who_look_are_one_reading() -> None:
    calls: list[int] = []

    def read() -> RackStatus:
        calls.append(1)
        time.sleep(0.2)
        return SERVES

    async def scenario() -> None:
        view = RackView(read)
        assert await asyncio.gather(*(view.status() for _ in range(20))) == [SERVES] * 20
        assert await view.status() == SERVES
        view._began -= 2 * rack_view.FRESH_S
        await asyncio.gather(*(view.status() for _ in range(20)))

    asyncio.run(scenario())
    assert len(calls) == 2


def test_a_head_that_hangs_holds_one_thread_and_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rack_view, "WAIT_S", 0.1)
    over, calls = threading.Event(), []

    def hang() -> RackStatus:
        calls.append(1)
        over.wait()
        return SERVES

    async def scenario() -> None:
        view = RackView(hang)
        try:
            for _ in range(2):
                asked = await asyncio.gather(*(view.status() for _ in range(5)), return_exceptions=True)
                assert [(error.status, error.body["error"]["message"]) for error in asked] == [  # type: ignore[union-attr]
                    (503, rack_view.SILENT)
                ] * 5
                view._began -= 2 * rack_view.FRESH_S
        finally:
            over.set()
        monkeypatch.setattr(rack_view, "WAIT_S", 60.0)
        assert await view.status() == SERVES

    asyncio.run(scenario())
    assert len(calls) <= 2


def raising(error: Exception) -> Callable[[], RackStatus]:
    def read() -> RackStatus:
        raise error

    return read


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (SettingsError("The rack's head does not answer (gone)."), "The rack's head does not answer (gone)."),
        (RpcError("gone"), rack_view.SILENT),
    ],
)
def test_a_head_that_is_gone_is_a_503(error: Exception, says: str) -> None:
    with pytest.raises(RefusalError) as refusal:
        asyncio.run(RackView(raising(error)).status())
    assert (refusal.value.status, refusal.value.body["error"]["message"]) == (503, says)


# --- the routes ------------------------------------------------------------------------------------------------------


def test_the_route_answers_the_document() -> None:
    answer = asked("/v1/rack")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
    expected = rack_view.document(SERVES, [rack_view.ModelState("m", "serving", None)])
    assert answer.json() == json.loads(json.dumps(expected))


def test_the_route_takes_the_key() -> None:
    keys = frozenset({"key"})
    refused = asked("/v1/rack", keys)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "AuthenticationError")
    assert asked("/v1/rack", keys, authorization="Bearer key").status_code == 200
