"""Runs one HTTP request through an ASGI application without a server.

    Exchange.body --> application --Exchange.head, Exchange.piece--> whoever asked

Once nobody waits (Exchange.gone) the application sees `http.disconnect` and is then cancelled, which is how vLLM comes
to abort the request and free its blocks.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pomarium.cluster.http.asgi import App, Message

LEAVE_S = 5.0
"""How long an application may take to notice a disconnect before it is cancelled outright."""


@dataclass(frozen=True)
class Head:
    """Start of a response."""

    status: int
    media_type: str


class Exchange(Protocol):
    """Who asks an application.

    Attributes:
        gone: set once nobody waits for the answer any more.
    """

    gone: asyncio.Event

    async def body(self) -> tuple[bytes, bool] | None:
        """The next piece of the request's body, and whether more follow; None once nobody waits."""
        ...

    async def head(self, head: Head) -> None:
        """The answer begins."""
        ...

    async def piece(self, piece: bytes) -> None:
        """More of its body. Waits while whoever asked does not keep up."""
        ...

    def give_up(self) -> None:
        """Nobody waits any more: `piece` drops what it gets and does not wait."""
        ...


class Collected:
    """An Exchange for a body that is there, whose answer is kept whole.

    Attributes:
        status: 500 until the answer has begun.
    """

    def __init__(self, body: bytes) -> None:
        self.gone = asyncio.Event()
        self.status = 500
        self._body = body
        self._pieces: list[bytes] = []

    async def body(self) -> tuple[bytes, bool] | None:
        """See Exchange."""
        return self._body, False

    async def head(self, head: Head) -> None:
        """See Exchange."""
        self.status = head.status

    async def piece(self, piece: bytes) -> None:
        """See Exchange."""
        self._pieces.append(piece)

    def give_up(self) -> None:
        """See Exchange."""

    @property
    def answer(self) -> bytes:
        """So far."""
        return b"".join(self._pieces)


def scope(method: str, path: str, headers: Sequence[tuple[str, str]]) -> Message:
    """ASGI connection scope of one request."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in headers],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }


async def run(app: App, request: Message, exchange: Exchange) -> None:
    """Have `app` answer; returns when it has, or when nobody waits and it has ended.

    Raises:
        whatever `app` raises.
    """
    whole, over = False, asyncio.Event()

    async def receive() -> Message:
        nonlocal whole
        if not whole and (part := await exchange.body()) is not None:
            whole = not part[1]
            return {"type": "http.request", "body": part[0], "more_body": part[1]}
        await over.wait()
        return {"type": "http.disconnect"}

    async def leave() -> None:
        await exchange.gone.wait()
        over.set()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await exchange.head(Head(message["status"], _media_type(message["headers"])))
        elif piece := message.get("body", b""):
            await exchange.piece(piece)

    answering: asyncio.Future[None] = asyncio.ensure_future(app(request, receive, send))
    left = asyncio.create_task(leave())
    try:
        await asyncio.wait({answering, left}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            await answering
    finally:
        left.cancel()
        # In this order: cancelled while it waits to send, a stream would not close what it streams from.
        exchange.give_up()
        over.set()
        await _leave(answering)


async def _leave(task: "asyncio.Future[None]") -> None:
    """Wait for an application that was told of a disconnect; cancel it if it does not notice."""
    if task.done():
        return
    await asyncio.wait({task}, timeout=LEAVE_S)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _media_type(headers: Sequence[tuple[bytes, bytes]]) -> str:
    return next((v.decode("latin-1") for k, v in headers if k.lower() == b"content-type"), "application/octet-stream")
