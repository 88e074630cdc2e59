"""ASGI's callables (ASGI 3.0, HTTP), an answer from whatever stands before an application, clients that leave."""

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect

T = TypeVar("T")

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


async def while_there(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` gives, which is cancelled if the client leaves before.

    Args:
        receive: of a request whose body has been read: all that may come is that the client is gone.

    Raises:
        ClientDisconnect: it is.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.wait({working})


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
