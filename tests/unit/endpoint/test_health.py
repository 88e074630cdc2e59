"""/health: what it says of each model, within two seconds, whatever hangs."""

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from ingress_requests import MISSING, dual, reasons_of, request
from ray.exceptions import ActorDiedError
from starlette.responses import Response

from pomarium.cluster import faults
from pomarium.cluster.endpoint import holding, reasons
from pomarium.cluster.endpoint import ingress as ingress_module
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.replica.loss import EngineLostError


class Health:
    """A handle whose `healthy` raises `fault`, answers a word, or never answers."""

    deployment_name = "engine:m"

    def __init__(self, fault: Exception | str | None) -> None:
        self._fault = fault
        self.healthy = self

    def remote(self) -> "Health":
        return self

    def __await__(self) -> Any:
        if self._fault is None:
            yield from asyncio.sleep(60).__await__()
        if isinstance(self._fault, str):
            yield from asyncio.sleep(0).__await__()
            return self._fault
        raise self._fault or AssertionError

    def cancel(self) -> None:
        """Serve's call is given up."""


def health(fault: Exception | str | None, read: Callable[[], dict[str, State]]) -> tuple[int, dict[str, Any], float]:
    async def ask() -> tuple[int, dict[str, Any], float]:
        ingress = Ingress({"m": Health(fault)}, head_answers=lambda: True, shortage=lambda: None)
        ingress._reasons = Reasons(read)
        began = time.monotonic()
        answer = await ingress.health(request())
        return answer.status_code, json.loads(bytes(answer.body)), time.monotonic() - began

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (f"Retrying. Error:\n{faults.StartError(MISSING)}\n", MISSING),
        ("A replica's health check failed. This deployment will be UNHEALTHY.", f"{reasons.LOST}; {reasons.ANOTHER}"),
        ("Deploying,\n since 3 s.", "no engine answers; Serve says: Deploying, since 3 s."),
        ("", reasons.UNKNOWN),
    ],
)
@pytest.mark.parametrize("fault", [NoReplicaError(), ActorDiedError()])
def test_health_tells_the_reason(fault: Exception, message: str, reason: str) -> None:
    status, body, _ = health(fault, lambda: {"engine:m": State(message)})
    assert (status, body) == (503, {"status": "unavailable", "models": {"m": reason}})


def test_health_says_what_an_engine_says_of_its_steps() -> None:
    for word in ("ok", "ok, but no step of its engine has ended for 12 s"):
        status, body, _ = health(word, dict)
        assert (status, body) == (200, {"status": "ok", "models": {"m": word}})


def test_health_is_bounded_whatever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ingress_module.HEALTH_S + reasons.READ_S <= 2
    monkeypatch.setattr(ingress_module, "HEALTH_S", 0.2)
    monkeypatch.setattr(reasons, "READ_S", 0.1)

    def hang() -> dict[str, State]:
        time.sleep(1.5)
        return {}

    status, body, took = health(None, hang)
    assert (status, body["models"]) == (503, {"m": holding.SILENT})
    assert took < 1


def test_health_tells_that_rays_head_has_ended() -> None:
    async def ask() -> Response:
        return await Ingress({}, head_answers=lambda: False).health(request())

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert json.loads(bytes(answer.body))["reason"].startswith("Ray's head process (GCS) has ended")


def test_a_health_check_that_meets_a_dead_engine_tells_of_what() -> None:
    status, body, _ = health(dual(EngineLostError("its worker was killed")), dict)
    assert (status, body["models"]["m"]) == (503, f"{reasons.LOST} (its worker was killed); {reasons.ANOTHER}")


@pytest.mark.parametrize("fault", [None, NoReplicaError()])
def test_health_names_a_full_disk(fault: Exception | None) -> None:
    class Well(Health):
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            if self._fault is not None:
                raise self._fault
            return True

    async def ask() -> Response:
        ingress = Ingress({"m": Well(fault)}, head_answers=lambda: True, shortage=lambda: "The disk is full.")
        ingress._reasons = reasons_of("")
        return await ingress.health(request())

    answer = asyncio.run(ask())
    assert answer.status_code == (200 if fault is None else 503)
    assert json.loads(bytes(answer.body))["disk"] == "The disk is full."
