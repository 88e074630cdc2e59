"""What a client is told of an engine that is lost, falls silent, or is not there."""

import asyncio
import json
from typing import Any

import pytest
from ingress_requests import (
    MISSING,
    SSE,
    Handle,
    Items,
    dual,
    generated,
    ingress_of,
    reasons_of,
    refusal,
    request,
    unsent,
)
from ray.exceptions import ActorDiedError

from pomarium.cluster import faults
from pomarium.cluster.endpoint.answers import Accepted, CutError
from pomarium.cluster.endpoint.continued import EndpointEndsError
from pomarium.cluster.endpoint.relay import RefusalError, Relay
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.http import openai_app, openai_errors
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineLostError


def test_an_engine_lost_before_its_answer_is_a_503() -> None:
    items = Items(Accepted(), ActorDiedError())
    error = refusal(lambda: ingress_of(Handle(items)).generate(request(b"{}"), unsent))
    assert error.status == 503
    assert "lost" in error.body["error"]["message"]
    assert items.cancelled


def streamed(items: Items, at: str = "/v1/completions") -> str:
    status, sent = asyncio.run(generated(ingress_of(Handle(items)), request(b"{}", at=at)))
    assert status == 200
    return sent


def test_an_engine_lost_in_a_stream_is_a_last_event() -> None:
    items = Items(Accepted(), Head(200, SSE), b"data: 1\n\n", ActorDiedError())

    first, error, end, _ = streamed(items).split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert items.cancelled


@pytest.mark.parametrize(("at", "kind"), [("/v1/messages", "overloaded_error"), ("/v1/responses", "ServiceUnav")])
def test_an_engine_lost_in_a_stream_of_named_events_is_one_too(at: str, kind: str) -> None:
    items = Items(Accepted(), Head(200, SSE), b"event: ping\ndata: {}\n\n", EngineLostError("its worker was killed"))

    first, last, nothing = streamed(items, at).split("\n\n")
    assert (first, nothing) == ("event: ping\ndata: {}", "")
    name, data = last.split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (name, told["type"]) == ("event: error", "error")
    assert told["error"]["type"].startswith(kind)
    assert "its worker was killed" in told["error"]["message"]
    if at == "/v1/responses":
        assert (told["code"], told["message"]) == (503, told["error"]["message"])


@pytest.mark.parametrize(
    "lost", [EngineLostError("its worker was killed"), dual(EngineLostError("its worker was killed"))]
)
def test_what_an_engine_died_of_reaches_the_client(lost: Exception) -> None:
    """Also as Ray hands it on: an exception whose own text is the replica's traceback."""
    expected = "The engine of `m` is not available: it was lost under way: its worker was killed. Try again shortly."
    error = refusal(lambda: ingress_of(Handle(Items(Accepted(), lost))).generate(request(b"{}"), unsent))
    assert (error.status, error.body["error"]["message"]) == (503, expected)

    event = streamed(Items(Accepted(), Head(200, SSE), b"data: 1\n\n", lost)).split("\n\n")[1]
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == expected


def test_a_503_says_when_to_try_again() -> None:
    for status, names in ((503, ["Retry-After"]), (500, []), (401, [])):
        assert list(openai_errors.headers(status)) == names
    answer = openai_app.response(request(), RefusalError(*openai_errors.engine_unavailable("m", "x")))
    assert int(answer.headers["retry-after"]) > 0


def relayed(*items: Any) -> Relay:
    return Relay("m", "/v1/completions", Items(*items), lambda: reasons_of("").why("engine:m"))


def test_a_request_without_a_replica_is_refused_with_the_reason() -> None:
    message = f"A replica failed to start with exception. Retrying. Error:\n{faults.StartError(MISSING)}"
    ingress = ingress_of(Handle(Items(NoReplicaError())))
    ingress._reasons = reasons_of(message)
    error = refusal(lambda: ingress.generate(request(b"{}"), unsent))
    assert (error.status, MISSING in error.body["error"]["message"]) == (503, True)


GIVEN_UP = [
    (SilentError(), "has not answered"),
    (CutError(), "lost under way"),
    (EndpointEndsError(), "the endpoint is being stopped"),
]


@pytest.mark.parametrize("before", [(), (Accepted(),)])
@pytest.mark.parametrize(("fault", "says"), GIVEN_UP)
def test_an_engine_that_is_given_up_is_a_503(before: tuple[Any, ...], fault: Exception, says: str) -> None:
    error = refusal(lambda: relayed(*before, fault).head())
    assert (error.status, says in error.body["error"]["message"]) == (503, True)


@pytest.mark.parametrize(("fault", "says"), GIVEN_UP)
def test_an_engine_that_is_given_up_in_a_stream_is_a_last_event(fault: Exception, says: str) -> None:
    items = Items(Accepted(), Head(200, SSE), b"data: 1\n\n", fault)

    first, error, end, _ = streamed(items).split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert says in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert items.cancelled
