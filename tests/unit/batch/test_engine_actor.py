"""What a batch's engine answers, and what it leaves to another one."""

import asyncio
from typing import Any

import pytest

from pomarium.cluster.batch.actor import EngineActor
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.node.worker_environment import Secrets
from pomarium.cluster.replica.hosting import Name
from pomarium.cluster.replica.loss import EngineGoneError, EngineLostError, EngineMovedError
from pomarium.cluster.replica.serve_plan import ModelPlan


class Hosted:
    """An engine that lives, and answers or raises."""

    def __init__(self, fault: Exception | None) -> None:
        self._fault = fault

    async def answer(self, asked: Any, collected: Any) -> None:
        if self._fault is not None:
            raise self._fault
        await collected.head(Head(200, "application/json"))
        await collected.piece(b"{}")

    async def check_health(self) -> None:
        pass


def answer(fault: Exception | None, monkeypatch: pytest.MonkeyPatch) -> tuple[int, bytes]:
    found: Any = None
    actor = EngineActor(ModelPlan("m"), found, Name("job#0", "job"), Secrets({}))
    monkeypatch.setattr(actor, "_hosted", Hosted(fault), raising=False)
    return asyncio.run(actor.answer("/v1/completions", b"{}"))


def test_a_line_is_answered_or_its_fault_is_its_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(None, monkeypatch) == (200, b"{}")
    status, body = answer(ValueError("no such thing"), monkeypatch)
    assert (status, b"no such thing" in body) == (500, True)


@pytest.mark.parametrize("fault", [EngineLostError("it died"), EngineGoneError("it goes"), EngineMovedError("it goes")])
def test_what_an_engine_leaves_is_no_answer(fault: EngineLostError, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job asks another engine."""
    with pytest.raises(type(fault)):
        answer(fault, monkeypatch)
