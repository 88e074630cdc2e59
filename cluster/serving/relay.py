"""An engine's answer on its way to the client: the items of `EngineReplica.request` as a response, losses included."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from ray.exceptions import RayActorError

from pomarium.cluster.serving import openai_errors
from pomarium.cluster.serving.asgi_bridge import Head
from pomarium.cluster.serving.engine import Accepted

ACCEPT_S = 120.0
"""How long a request waits for an engine while none runs (Serve is replacing it): about two starts."""


class RefusalError(Exception):
    """An answer that ends the request here: HTTP status and OpenAI error body."""

    def __init__(self, status: int, body: dict[str, Any]) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body


class Relay:
    """An engine's answer on its way to the client. A loss becomes a 503, or an error event if the answer had begun."""

    def __init__(self, model: str, items: Any) -> None:
        self._model = model
        self._items = items
        self._iterator = aiter(items)

    async def head(self) -> Head:
        """Wait for a replica to take the request and to begin its answer.

        Raises:
            RefusalError: 503 if no engine takes it in time, or if the engine is lost before it begins.
        """
        try:
            async with asyncio.timeout(ACCEPT_S):
                accepted = await anext(self._iterator)
            head = await anext(self._iterator)
        except TimeoutError:
            raise RefusalError(*openai_errors.engine_unavailable(self._model, "none is running")) from None
        except (RayActorError, StopAsyncIteration):
            raise RefusalError(*openai_errors.engine_unavailable(self._model, "it was lost under way")) from None
        if not isinstance(accepted, Accepted) or not isinstance(head, Head):
            raise TypeError(f"an engine began its answer with {accepted!r}, {head!r}")
        return head

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body. Raises RefusalError (503) if the engine is lost."""
        try:
            async for piece in self._iterator:
                yield piece
        except RayActorError:
            raise RefusalError(*openai_errors.engine_unavailable(self._model, "it was lost under way")) from None

    async def events(self) -> AsyncIterator[bytes]:
        """The body as server-sent events: a loss becomes a last event, since the status has left already."""
        try:
            async for piece in self.pieces():
                yield piece
        except RefusalError as lost:
            yield f"data: {json.dumps(lost.body)}\n\ndata: [DONE]\n\n".encode()
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Tell the engine that nobody waits any more. Harmless once the answer is complete."""
        self._items.cancel()
