"""An ASGI application behind a stream: answers, pieces, disconnects. Driven with real Starlette applications."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.asgi_bridge import Collected, Head


class Kept(Collected):
    """Keeps the head, and tells of pieces as they come."""

    def __init__(self, body: bytes = b"") -> None:
        super().__init__(body)
        self.kept: Head | None = None
        self.came = asyncio.Event()

    async def head(self, head: Head) -> None:
        self.kept = head
        await super().head(head)

    async def piece(self, piece: bytes) -> None:
        await super().piece(piece)
        self.came.set()


async def collect(app: Starlette, path: str, body: bytes = b"") -> Kept:
    scope = asgi_bridge.scope("POST", path, [("Content-Type", "application/json"), ("X-Request-Id", "r1")])
    kept = Kept(body)
    await asgi_bridge.run(app, scope, kept)
    return kept


def application(ended: list[str]) -> Starlette:
    async def echo(request: Request) -> Response:
        return JSONResponse({"got": (await request.body()).decode(), "id": request.headers["x-request-id"]}, 201)

    async def stream(_: Request) -> Response:
        async def events() -> AsyncIterator[str]:
            try:
                for i in range(10_000):
                    yield f"data: {i}\n\n"
                    await asyncio.sleep(0.001 if i else 0)
            finally:
                ended.append("stream")

        return StreamingResponse(events(), media_type="text/event-stream")

    async def silent(_: Request) -> Response:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append("silent")
        return Response()

    async def broken(_: Request) -> Response:
        raise ValueError("broken handler")

    routes = {"/echo": echo, "/stream": stream, "/silent": silent, "/broken": broken}
    return Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in routes.items()])


def test_head_and_body_arrive() -> None:
    kept = asyncio.run(collect(application([]), "/echo", b"hello"))
    assert (kept.kept, kept.status) == (Head(201, "application/json"), 201)
    assert kept.answer == b'{"got":"hello","id":"r1"}'


def test_an_unknown_path_is_the_applications_answer() -> None:
    assert asyncio.run(collect(application([]), "/none")).status == 404


@pytest.mark.parametrize("way", ["gone", "cancelled"])
def test_leaving_a_stream_ends_the_application_at_once(way: str) -> None:
    ended: list[str] = []

    async def leave_early() -> Kept:
        kept = Kept()
        running = asyncio.ensure_future(
            asgi_bridge.run(application(ended), asgi_bridge.scope("POST", "/stream", []), kept)
        )
        await kept.came.wait()
        if way == "gone":
            kept.gone.set()
            await asyncio.wait_for(running, 2)
        else:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(running, 2)
        return kept

    kept = asyncio.run(leave_early())
    assert kept.kept == Head(200, "text/event-stream; charset=utf-8")
    assert kept.answer.startswith(b"data: 0\n\n")
    assert ended == ["stream"]


def test_leaving_before_any_answer_cancels_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_bridge, "LEAVE_S", 0.05)
    ended: list[str] = []

    async def leave_early() -> None:
        kept = Kept()
        kept.gone.set()
        await asgi_bridge.run(application(ended), asgi_bridge.scope("POST", "/silent", []), kept)

    asyncio.run(leave_early())
    assert ended == ["silent"]


def test_a_handlers_exception_comes_through() -> None:
    with pytest.raises(ValueError, match="broken handler"):
        asyncio.run(collect(application([]), "/broken"))
