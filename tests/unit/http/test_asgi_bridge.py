"""An ASGI application behind a stream: answers, pieces, disconnects. Driven with real Starlette applications."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.asgi_bridge import Head


async def collect(app: Starlette, path: str, body: bytes = b"") -> list[Head | bytes]:
    scope = asgi_bridge.scope("POST", path, [("Content-Type", "application/json"), ("X-Request-Id", "r1")])
    return [item async for item in asgi_bridge.call(app, scope, body)]


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
    head, *pieces = asyncio.run(collect(application([]), "/echo", b"hello"))
    assert head == Head(201, "application/json")
    assert b"".join(p for p in pieces if isinstance(p, bytes)) == b'{"got":"hello","id":"r1"}'


def test_an_unknown_path_is_the_applications_answer() -> None:
    head, *_ = asyncio.run(collect(application([]), "/none"))
    assert isinstance(head, Head)
    assert head.status == 404


def test_leaving_a_stream_ends_the_application_at_once() -> None:
    ended: list[str] = []

    async def leave_early() -> bytes:
        answer = asgi_bridge.call(application(ended), asgi_bridge.scope("POST", "/stream", []), b"")
        head = await anext(answer)
        assert head == Head(200, "text/event-stream; charset=utf-8")
        first = await anext(answer)
        assert isinstance(first, bytes)
        await asyncio.wait_for(answer.aclose(), 2)
        return first

    assert asyncio.run(leave_early()).startswith(b"data: 0\n\n")
    assert ended == ["stream"]


def test_leaving_before_any_answer_cancels_the_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_bridge, "LEAVE_S", 0.05)
    ended: list[str] = []

    async def leave_early() -> None:
        answer = asgi_bridge.call(application(ended), asgi_bridge.scope("POST", "/silent", []), b"")
        waiting = asyncio.ensure_future(anext(answer))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(leave_early())
    assert ended == ["silent"]


def test_a_handlers_exception_comes_through() -> None:
    with pytest.raises(ValueError, match="broken handler"):
        asyncio.run(collect(application([]), "/broken"))
