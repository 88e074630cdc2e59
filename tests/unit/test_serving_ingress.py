"""What the ingress decides by itself: keys, models, and what becomes of an engine that is lost."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from pomarium.cluster.serving import asgi_bridge, relay
from pomarium.cluster.serving.asgi_bridge import Head
from pomarium.cluster.serving.engine import Accepted
from pomarium.cluster.serving.ingress import Ingress
from pomarium.cluster.serving.relay import RefusalError, Relay

SSE = "text/event-stream"


class Items:
    """What a Serve handle returns for a streamed call: an async iterator with `cancel`."""

    def __init__(self, *items: Any) -> None:
        self._items = self._iterate(items)
        self.cancelled = False

    async def _iterate(self, items: tuple[Any, ...]) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            if callable(item):
                await item()
            else:
                yield item

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._items

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A Serve handle whose engine answers with `items`."""

    def __init__(self, items: Items) -> None:
        self._items = items
        self.request = self
        self.calls: list[tuple[Any, ...]] = []

    def options(self, *, stream: bool) -> "Handle":
        assert stream
        return self

    def remote(self, *arguments: Any) -> Items:
        self.calls.append(arguments)
        return self._items


def request(body: bytes = b"", headers: dict[str, str] | None = None) -> Request:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    scope = asgi_bridge.scope("POST", "/v1/completions", list((headers or {}).items()))
    return Request(scope, receive)


def refusal(call: Callable[[], Any]) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        asyncio.run(call())
    return caught.value


async def text(response: Response) -> str:
    if not isinstance(response, StreamingResponse):
        return bytes(response.body).decode()
    return b"".join([bytes(piece) async for piece in response.body_iterator]).decode()  # type: ignore[arg-type]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key"}])
def test_without_the_key_nobody_is_served(headers: dict[str, str]) -> None:
    handle = Handle(Items())
    ingress = Ingress({"m": handle}, frozenset({"key"}))
    for call in (ingress.models, ingress.generate, ingress.prometheus):
        error = refusal(lambda call=call: call(request(b"{}", headers)))
        assert (error.status, error.body["error"]["type"]) == (401, "AuthenticationError")
    assert handle.calls == []


def test_with_a_key_the_models_are_shown() -> None:
    ingress = Ingress({"m": Handle(Items())}, frozenset({"k1", "k2"}))
    answer = asyncio.run(ingress.models(request(headers={"Authorization": "Bearer k2"})))
    assert [card["id"] for card in json.loads(bytes(answer.body))["data"]] == ["m"]


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b'{"model": "x"}', 404), (b'{"model": 3}', 404), (b"{}", 400)],
)
def test_requests_without_a_served_model_are_refused(body: bytes, status: int) -> None:
    ingress = Ingress({"a": Handle(Items()), "b": Handle(Items())})
    assert refusal(lambda: ingress.generate(request(body))).status == status


def test_the_only_model_needs_no_name_and_the_body_passes_unread() -> None:
    handle = Handle(Items(Accepted(), Head(400, "application/json"), b'{"a":', b"1}"))
    body = b'{"prompt": "x",  "odd": [1]}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}

    async def ask() -> tuple[int, str]:
        answer = await Ingress({"m": handle}).generate(request(body, headers))
        return answer.status_code, await text(answer)

    assert asyncio.run(ask()) == (400, '{"a":1}')
    assert handle.calls == [("POST", "/v1/completions", body, [("content-type", "application/json")])]


def test_an_engine_lost_before_its_answer_is_a_503() -> None:
    items = Items(Accepted(), ActorDiedError())
    error = refusal(lambda: Ingress({"m": Handle(items)}).generate(request(b"{}")))
    assert error.status == 503
    assert "lost" in error.body["error"]["message"]
    assert items.cancelled


def test_an_engine_lost_in_a_stream_is_a_last_event() -> None:
    items = Items(Accepted(), Head(200, SSE), b"data: 1\n\n", ActorDiedError())

    async def ask() -> str:
        return await text(await Ingress({"m": Handle(items)}).generate(request(b"{}")))

    first, error, end, _ = asyncio.run(ask()).split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert items.cancelled


def test_a_request_that_no_engine_takes_is_a_503(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "ACCEPT_S", 0.05)
    error = refusal(lambda: Relay("m", Items(lambda: asyncio.sleep(10))).head())
    assert (error.status, "none is running" in error.body["error"]["message"]) == (503, True)
