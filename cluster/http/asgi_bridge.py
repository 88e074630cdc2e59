"""Runs one HTTP request through an ASGI application without a server, as a stream that can cross a Serve handle.

    ingress --(path, body, headers)--> replica: call(app, ...) --> Head, bytes, bytes, ... --> ingress

Closing the stream early is the client's disconnect: the application sees `http.disconnect` and is then cancelled, which
is how vLLM comes to abort the request and free its blocks.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from pomarium.cluster.http.asgi import App, Message

LEAVE_S = 5.0
"""How long an application may take to notice a disconnect before it is cancelled outright."""


@dataclass(frozen=True)
class Head:
    """Start of a response."""

    status: int
    media_type: str


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


async def call(app: App, request: Message, body: bytes) -> AsyncGenerator[Head | bytes, None]:
    """Head, then the body in pieces. Pieces that wait together leave together.

    Raises:
        whatever `app` raises before it has begun its response.
    """
    answers: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    pending_body = [body]

    async def receive() -> Message:
        if pending_body:
            return {"type": "http.request", "body": pending_body.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(request, receive, answers.put)
        finally:
            await answers.put(None)

    task = asyncio.create_task(run())
    try:
        while (message := await answers.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(message["status"], _media_type(message["headers"]))
                continue
            piece, ended = _drain(answers, message["body"])
            if piece:
                yield piece
            if ended:
                break
        await task
    finally:
        gone.set()
        await _leave(task)


def _drain(answers: "asyncio.Queue[Message | None]", first: bytes) -> tuple[bytes, bool]:
    """`first` and all body pieces that already wait; True if the end waits behind them."""
    pieces = [first]
    while not answers.empty():
        message = answers.get_nowait()
        if message is None:
            return b"".join(pieces), True
        pieces.append(message["body"])
    return b"".join(pieces), False


async def _leave(task: "asyncio.Task[None]") -> None:
    """Wait for an application that was told of a disconnect; cancel it if it does not notice."""
    if task.done():
        return
    await asyncio.wait({task}, timeout=LEAVE_S)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _media_type(headers: Sequence[tuple[bytes, bytes]]) -> str:
    return next((v.decode("latin-1") for k, v in headers if k.lower() == b"content-type"), "application/octet-stream")
