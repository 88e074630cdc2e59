"""Signs of life in an answer: a replica that has nothing to say says so, and who waits for it gives up without them.

    replica.py: beating(items) --item, Alive, Alive, item--> relay.py: next_item(iterator), raises SilentError

A replica whose machine lost its power or its cable sends no error and resets no connection; Ray finds out after a
minute by default. A sign shows that the replica's process runs: engine and workers are watched from there.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

BEAT_S = 1.0
"""How long a replica is quiet before it gives a sign of life."""

SILENCE_S = 8.0
"""How long a request waits for any item: what was running at a fault has its error within ten seconds."""


@dataclass(frozen=True)
class Alive:
    """The answer takes a while, but the replica lives."""


class SilentError(Exception):
    """No item and no sign of life came in time."""


async def beating(items: AsyncGenerator[T, None], period_s: float = BEAT_S) -> AsyncGenerator[T | Alive, None]:
    """`items`, and an `Alive` whenever none came for `period_s`. Closing it closes `items`."""
    waiting: asyncio.Future[T] = asyncio.ensure_future(anext(items))
    try:
        while True:
            await asyncio.wait({waiting}, timeout=period_s)
            if not waiting.done():
                yield Alive()
                continue
            try:
                item = waiting.result()
            except StopAsyncIteration:
                return
            yield item
            waiting = asyncio.ensure_future(anext(items))
    finally:
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError, StopAsyncIteration, Exception):
            await waiting
        await items.aclose()


async def next_item(iterator: AsyncIterator[Any], silence_s: float | None = None) -> Any:
    """The next item that is no sign of life.

    Raises:
        SilentError: if nothing came for `silence_s` (SILENCE_S by default). The iterator is of no use afterwards.
        StopAsyncIteration: at the end.
    """
    limit = SILENCE_S if silence_s is None else silence_s
    while True:
        try:
            async with asyncio.timeout(limit):
                item = await anext(iterator)
        except TimeoutError:
            raise SilentError from None
        if not isinstance(item, Alive):
            return item
