"""ASGI's callables, and an answer of JSON from a middleware that lets nothing further answer (ASGI 3.0, HTTP)."""

import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


async def answer_json(send: Send, status: int, body: dict[str, Any], more: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """The whole answer. `more`: headers beside type and length."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
