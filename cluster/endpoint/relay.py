"""An engine's answer on its way to the client: the items of an `Answer` (answers.py) as a response, losses included.

Nothing here waits for ever: a request that no replica is there for is refused at once, and one whose replica falls
silent (frozen, or its machine without power or cable) is given up after heartbeat.SILENCE_S.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from pomarium.cluster import faults
from pomarium.cluster.endpoint import holding
from pomarium.cluster.endpoint.answers import Accepted
from pomarium.cluster.endpoint.continued import ABSENCES, LOSSES, EndpointEndsError
from pomarium.cluster.endpoint.holding import HopelessError, State
from pomarium.cluster.http import openai_errors, protocols
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.replica import heartbeat
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineLostError

LOST = "it was lost under way"
ENDS = "the endpoint is being stopped"
SILENT = f"it has not answered for {heartbeat.SILENCE_S:g} s"


class Relay:
    """An engine's answer on its way to the client. A loss, or the endpoint's own end, becomes a 503, or an error event
    if the answer had begun.

    `path`: of the request, which says what such an event looks like. `why` tells why no replica runs. `state`: of a
    model that may sleep, for which the request is held; else None.
    """

    def __init__(
        self,
        model: str,
        path: str,
        items: Any,
        why: Callable[[], Awaitable[str]],
        state: Callable[[], Awaitable[State]] | None = None,
    ) -> None:
        self._model, self._path = model, path
        self._items = items
        self._iterator = aiter(items)
        self._why = why
        self._state = state
        self._refused = False

    async def head(self) -> Head:
        """Wait for a replica to take the request and to begin its answer.

        Raises:
            RefusalError: 503 if there is no replica, or if it is lost or falls silent before it begins.
        """
        try:
            accepted = await self._accepted()
            head = await anext(self._iterator)
        except ABSENCES:
            self._refused = True
            raise self._unavailable(await self._why()) from None
        except (*LOSSES, StopAsyncIteration, EndpointEndsError) as lost:
            raise self._unavailable(_lost(lost)) from None
        except HopelessError as hopeless:
            self._items.cancel()
            self._refused = True
            raise self._unavailable(str(hopeless)) from None
        if not isinstance(accepted, Accepted) or not isinstance(head, Head):
            raise TypeError(f"an engine began its answer with {accepted!r}, {head!r}")
        return head

    async def _accepted(self) -> Any:
        """A replica has taken the request."""
        if self._state is None:
            return await anext(self._iterator)
        return await holding.held(anext(self._iterator), self._state)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body. Raises RefusalError (503) if the engine is lost or falls silent, or the endpoint ends."""
        try:
            while True:
                yield await anext(self._iterator)
        except StopAsyncIteration:
            return
        except (*LOSSES, EndpointEndsError) as lost:
            raise self._unavailable(_lost(lost)) from None

    def _unavailable(self, reason: str) -> RefusalError:
        return RefusalError(*openai_errors.engine_unavailable(self._model, reason))

    async def events(self) -> AsyncIterator[bytes]:
        """The body as server-sent events: a loss becomes a last event, since the status has left already."""
        try:
            async for piece in self.pieces():
                yield piece
        except RefusalError as lost:
            yield protocols.last_event(self._path, lost.status, lost.body)
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Tell the engine that nobody waits any more. Harmless once the answer is complete."""
        if not self._refused:  # else Serve raises once more what kept it from sending the request
            self._items.cancel()


def _lost(error: Exception) -> str:
    """The engine was lost, and of what as far as that is known; or it is silent, or the endpoint ends."""
    if isinstance(error, EndpointEndsError):
        return ENDS
    if isinstance(error, SilentError):
        return SILENT
    return f"{LOST}: {faults.sentence(error)}" if isinstance(error, EngineLostError) else LOST
