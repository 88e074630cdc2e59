"""What stands before Serve's proxy: bounds on what a client sends, as ASGI middleware in the proxy's process.

    client --HTTP--> timed_protocol.py --Door--> Serve's proxy --> ingress: Door once more --> routes

Serve builds its proxy with the middlewares that CALLBACK names (ray/serve/_private/http_util.py,
configure_http_middlewares). So a body that is too large or too slow is refused before anything of it is kept, in proxy
or ingress; paths of Serve's own, which ask for no key, are not there; and headers that Serve cannot read, or that tell
it what is not for a client to decide, do not reach it. A Ray that was started without this variable has the ingress's
Door only, behind its proxy.
"""

import asyncio
import os
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.asgi import App, Message, Receive, Send, answer_json
from pomarium.worker import settings

if TYPE_CHECKING:
    from starlette.middleware import Middleware

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = "pomarium.cluster.http.door:middlewares"

UPLOADS = "/v1/files"
FORM_BYTES = 64 << 10
"""What a multipart form may add to the file in it."""
LEAST_BYTES_PER_S = 16 << 10

SERVES_OWN = "/-/"
"""Paths that Serve's proxy answers itself, `/-/routes` and `/-/healthz`, without a key."""

NOT_FOR_CLIENTS = frozenset({b"x-request-timeout-seconds", b"x-request-disconnect-disabled"})
"""By these a load balancer of Serve's own tells its proxy how long to wait and whether to notice that a client left."""
READ_AS_TEXT = frozenset(
    {b"x-request-id", b"x-session-id", b"x_session_id", b"serve_multiplexed_model_id", b"serve-multiplexed-model-id"}
)
"""Headers that Serve's proxy decodes as UTF-8; what it cannot decode ends as a bare 500."""
LONGEST_TEXT = 200


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
    """The middleware. `bounds`: by default those of this process's environment."""

    def __init__(self, app: App, bounds: Bounds | None = None) -> None:
        self._app = app
        self._bounds = bounds or Bounds.of(settings.load(os.environ))

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(SERVES_OWN):
            path = openai_errors.shown(scope["path"])
            await _answer(send, *openai_errors.http(HTTPStatus.NOT_FOUND, f"{scope['method']} {path}: Not Found."))
            return
        most = self._bounds.most(scope["method"], scope["path"])
        if _content_length(scope) > most:
            await _answer(send, *openai_errors.too_large(most))
            return
        body = _Body(receive, send, most, self._bounds.timeout)
        try:
            await self._app({**scope, "headers": readable(scope["headers"])}, body.receive, body.send)
        except Exception:
            if body.refusal is None:
                raise
            # Else it is how the application ends when it is told that the client has left.
        await body.refuse()


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

    async def refuse(self) -> None:
        """Answer with the refusal, if there is one and it is not too late."""
        if self.refusal is not None and not self._begun:
            self._begun = True
            await _answer(self._send, *self.refusal)


def readable(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """`headers` without those that Serve cannot read or that clients do not set."""
    return [
        (name, value)
        for name, value in headers
        if name.isascii() and name not in NOT_FOR_CLIENTS and (name not in READ_AS_TEXT or _is_text(value))
    ]


def _is_text(value: bytes) -> bool:
    return 0 < len(value) <= LONGEST_TEXT and value.isascii() and value.decode("ascii").isprintable()


def _content_length(scope: Message) -> int:
    """What is announced; 0 if nothing is. The HTTP server has refused what is no number."""
    lengths = [int(value) for name, value in scope["headers"] if name == b"content-length" and value.isdigit()]
    return max(lengths, default=0)


async def _answer(send: Send, status: int, body: dict[str, Any]) -> None:
    # Of a body that is too large the rest is read, or no answer arrives.
    ends = status == HTTPStatus.REQUEST_TIMEOUT
    await answer_json(send, status, body, [(b"connection", b"close")] if ends else [])


def middlewares() -> "list[Middleware]":
    """What Serve's proxy calls when it starts (CALLBACK): the Door, and connections that end.

    Raises:
        SettingsError: a variable is not accepted.
    """
    from starlette.middleware import Middleware

    from pomarium.cluster.http import timed_protocol

    bounds = Bounds.of(settings.load(os.environ))
    timed_protocol.install(bounds.timeout)
    return [Middleware(Door, bounds=bounds)]
