"""Each request's name, and a line and a count when it is over: ASGI middleware.

request --X-Request-Id: the client's, or a new one--> the application
its end --> log line; `count(method, path, status)`
"""

import logging
import time
import uuid
from collections.abc import Callable

from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.asgi import App, Message, Receive, Send

logger = logging.getLogger(__name__)

REQUEST_ID = b"x-request-id"
LONGEST_ID = 200
"""Characters of a client's: it stands in logs, and in answers."""


class RequestLog:
    """The middleware. `count`: of requests that are over; 0 is the status of one that was not answered."""

    def __init__(self, app: App, count: Callable[[str, str, int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        others = [(name, value) for name, value in scope["headers"] if name != REQUEST_ID]
        name = request_id(scope["headers"])
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (REQUEST_ID, name)]}
            await send(message)

        try:
            await self._app({**scope, "headers": [*others, (REQUEST_ID, name)]}, receive, sending)
        finally:
            method, path = scope["method"], scope["path"]
            took = 1000 * (time.monotonic() - began)
            logger.info("%s %s %s %d %.1f ms", name.decode(), method, openai_errors.shown(path), status, took)
            self._count(method, path, status)


def request_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    """The client's, if it can be shown anywhere, else a new one."""
    given = next((value for name, value in headers if name == REQUEST_ID), b"")
    if 0 < len(given) <= LONGEST_ID and given.isascii() and given.decode("ascii").isprintable():
        return given
    return str(uuid.uuid4()).encode()
