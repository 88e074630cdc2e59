"""Requests to an ingress without a server, and engines that answer what they are told to."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import RayTaskError
from starlette.requests import Request

from pomarium.cluster.endpoint.dispatch import Dispatch
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.relay import RefusalError
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.http import answer_frames, asgi_bridge
from pomarium.cluster.http.asgi import Message
from pomarium.cluster.replica.serve_plan import Limits

SSE = "text/event-stream"


class Items:
    """What Answers.ask gives for a request: an async iterator with `cancel`."""

    def __init__(self, *items: Any) -> None:
        self._items = self._iterate(items)
        self._unsent = next((item for item in items if isinstance(item, NoReplicaError)), None)
        self.cancelled = False
        self.begun, self.replica, self.resumable = True, "r1", True

    def gained(self) -> int:
        return 1

    async def _iterate(self, items: tuple[Any, ...]) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        if self._unsent is not None:
            raise self._unsent
        self.cancelled = True


class Handle:
    """A Serve handle whose engine answers with `items`.

    Attributes:
        calls: of the engine. asked: what each was asked, and its body.
    """

    def __init__(self, items: Items) -> None:
        self._items = items
        self.request = self.healthy = self
        self.deployment_name = "engine:m"
        self.calls: list[tuple[Any, ...]] = []
        self.asked: list[tuple[answer_frames.Asked, bytes]] = []

    def remote(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    async def listen(self) -> Any:
        return self

    def ask(
        self,
        call: Callable[[Any], Any],
        asked: answer_frames.Asked,
        body: bytes,
        *,
        patient: bool,
        keeps: bool,
        over: Dispatch | None,
    ) -> Items:
        """Answers.ask."""
        assert (patient, keeps, over) == (False, True, None)
        call("where")
        self.asked.append((asked, body))
        return self._items


def ingress_of(handle: Handle) -> Ingress:
    return Ingress({"m": handle}, listen=handle.listen, limits=Limits(times=0))


def dual(error: Exception) -> Exception:
    """`error` as Ray raises it where a call of another process failed with it."""
    return RayTaskError("request", "Traceback ...", error).as_instanceof_cause()


def request(
    body: bytes = b"", headers: dict[str, str] | None = None, at: str = "/v1/completions", **path: str
) -> Request:
    """Of a client that stays. `at`: what it asks."""
    coming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not coming:
            await asyncio.get_running_loop().create_future()
        return coming.pop()

    scope = asgi_bridge.scope("POST", at, list((headers or {}).items()))
    return Request({**scope, "path_params": path}, receive)


async def unsent(message: Message) -> None:
    raise AssertionError(message)


async def generated(ingress: Ingress, asked: Request) -> tuple[int, str]:
    """Status and text of what `Ingress.generate` sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await ingress.generate(asked, send)
    start, *pieces = sent
    assert not pieces[-1].get("more_body", False)
    return start["status"], b"".join(piece["body"] for piece in pieces).decode()


async def answered(ingress: Ingress, asked: Request) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what the application answers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await ingress(asked.scope, asked.receive, send)
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


def refusal(call: Callable[[], Any]) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        asyncio.run(call())
    return caught.value


MISSING = "model needs 12.3 GiB more memory: add a Mac"


def reasons_of(message: str) -> Reasons:
    return Reasons(lambda: {"engine:m": State(message)})
