"""Bounds on what a client sends, as ASGI middleware before the ingress.

    client --HTTP--> timed_protocol.py --Door--> ingress

A body that is too large or too slow is refused before anything of it is kept.
"""

import asyncio
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pomarium.cluster.http import openai_errors, protocols
from pomarium.cluster.http.asgi import App, Message, Receive, Send, answer_json
from pomarium.worker import settings

UPLOADS = "/v1/files"
FORM_BYTES = 64 << 10
"""What a multipart form may add to the file in it."""
LEAST_BYTES_PER_S = 16 << 10


@dataclass(frozen=True)
class Bounds:
    """Of one request's body.

    Attributes:
        body, upload: bytes. timeout: seconds that a client may keep us waiting, beside what LEAST_BYTES_PER_S takes.
    """

    body: int
    upload: int
    timeout: float

    @classmethod
    def of(cls, values: settings.Settings) -> "Bounds":
        """As the environment says."""
        return cls(values.max_body, values.max_upload + FORM_BYTES, values.client_timeout)

    def most(self, method: str, path: str) -> int:
        """Bytes that the body of a request may have."""
        return self.upload if method == "POST" and path.rstrip("/") == UPLOADS else self.body


class Door:
    """The middleware."""

    def __init__(self, app: App, bounds: Bounds) -> None:
        self._app, self._bounds = app, bounds

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        most = self._bounds.most(scope["method"], scope["path"])
        if _content_length(scope) > most:
            await _answer(send, scope["path"], *openai_errors.too_large(most))
            return
        body = _Body(receive, send, most, self._bounds.timeout)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
            # Else it is how the application ends when it is told that the client has left.
        await body.refuse(scope["path"])


class _Body:
    """A request's body on its way in. Once it is refused, the application is told that the client has left, and
    nothing that it says is passed on."""

    def __init__(self, receive: Receive, send: Send, most: int, timeout: float) -> None:
        self._receive, self._send = receive, send
        self._most, self._timeout = most, timeout
        self._bytes, self._waited = 0, 0.0
        self._whole, self._begun = False, False
        self.refusal: tuple[int, dict[str, Any]] | None = None

    async def receive(self) -> Message:
        """ASGI's, bounded while the body comes in."""
        if self.refusal is not None:
            return {"type": "http.disconnect"}
        if self._whole:
            return await self._receive()
        left = self._timeout + self._bytes / LEAST_BYTES_PER_S - self._waited
        began = time.monotonic()
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except TimeoutError:
            self.refusal = openai_errors.too_slow(self._timeout)
            return {"type": "http.disconnect"}
        self._waited += time.monotonic() - began
        if message["type"] == "http.request":
            self._bytes += len(message.get("body", b""))
            self._whole = not message.get("more_body", False)
            if self._bytes > self._most:
                self.refusal = openai_errors.too_large(self._most)
                return {"type": "http.disconnect"}
        return message

    async def send(self, message: Message) -> None:
        """ASGI's."""
        if self.refusal is None or self._begun:
            self._begun = True
            await self._send(message)

    async def refuse(self, path: str) -> None:
        """Answer with the refusal, if there is one and it is not too late. `path`: of the request."""
        if self.refusal is not None and not self._begun:
            self._begun = True
            await _answer(self._send, path, *self.refusal)


def _content_length(scope: Message) -> int:
    """What is announced; 0 if nothing is. The HTTP server has refused what is no number."""
    lengths = [int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()]
    return max(lengths, default=0)


async def _answer(send: Send, path: str, status: int, body: dict[str, Any]) -> None:
    # Of a body that is too large the rest is read, or no answer arrives.
    ends = status == HTTPStatus.REQUEST_TIMEOUT
    told = protocols.error_body(path, status, body)
    await answer_json(send, status, told, [(b"connection", b"close")] if ends else [])
