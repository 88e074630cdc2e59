"""/v1/models: each model as vLLM shows it, with its context once an engine has told it."""

import asyncio
import json
from typing import Any

import pytest
from ingress_requests import refusal, request
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.routing import NoReplicaError


class Asked:
    """A handle whose engine tells its context, or fails to, and how often it was asked."""

    deployment_name = "engine:m"

    def __init__(self, *answers: int | Exception) -> None:
        self.context = self
        self.left = list(answers)

    def remote(self) -> "Asked":
        return self

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def shown(ingress: Ingress, path: str | None = None) -> dict[str, Any]:
    """What /v1/models says of the model, or /v1/models/`path`."""
    if path is None:
        (card,) = json.loads(bytes(asyncio.run(ingress.models(request())).body))["data"]
        return card
    return json.loads(bytes(asyncio.run(ingress.model(request(model=path))).body))


def test_a_model_s_card_has_what_vllm_s_has_and_an_engine_is_asked_once() -> None:
    engine = Asked(NoReplicaError(), 512)
    ingress = Ingress({"m": engine}, served={"m": Served("/models/m")})
    assert shown(ingress)["max_model_len"] is None, "there is no engine yet"
    card = shown(ingress)
    expected = ModelCard(id="m", root="/models/m", max_model_len=512, permission=[ModelPermission()], owned_by="us")
    assert card.keys() == expected.model_dump().keys()
    assert card["permission"][0].keys() == expected.permission[0].model_dump().keys()
    assert (card["root"], card["parent"], card["max_model_len"]) == ("/models/m", None, 512)
    assert shown(ingress) == shown(ingress, "m") == card
    assert shown(ingress, "")["data"] == [card], "the list, for a path that ends with the slash"
    assert refusal(lambda: ingress.model(request(model="other"))).status == 404


@pytest.mark.parametrize(("running", "context"), [(0, None), (1, 512)])
def test_a_model_that_sleeps_is_not_asked(running: int, context: int | None) -> None:
    ingress = Ingress({"m": Asked(*[512] * running)}, served={"m": Served("m", sleeps=True)})
    ingress._reasons = Reasons(lambda: {"engine:m": State("", running)})
    assert shown(ingress)["max_model_len"] == context
