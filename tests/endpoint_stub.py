"""An OpenAI endpoint that computes nothing, on a real socket."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pomarium.cluster.http.asgi import App
from pomarium.cluster.http.escaped_json import EscapedJson


class Stub:
    """Answers with `answers` in turn, then with what it was asked."""

    def __init__(self, *answers: Response) -> None:
        self.answers = list(answers)
        self.keys: list[str | None] = []

    async def complete(self, request: HttpRequest) -> Response:
        self.keys.append(request.headers.get("authorization"))
        if self.answers:
            return self.answers.pop(0)
        return EscapedJson({"id": "cmpl-1", "got": await request.json()})

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"data": []})


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    app = Starlette(routes=[
        Route("/v1/completions", stub.complete, methods=["POST"]), Route("/v1/models", stub.models)
    ])  # fmt: skip
    with app_serving(app) as url:
        yield url


@contextmanager
def app_serving(app: App, port: int = 0) -> Iterator[str]:
    """The URL at which it answers. port: 0 for a free one."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
