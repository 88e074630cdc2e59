"""An engine's planned end: a Mac that it runs on is drained (rack/drains.py), so it takes nothing more, and goes.

    Ray's head --drains.read_all, each LOOK_S--> Departure: nobody new; then what runs is to go on elsewhere
    Hosted.answer --Departure.attended: the answer, or EngineMovedError--> the ingress asks another engine

An engine that is drained is alive: what it leaves, it leaves between two messages of an answer.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from ray.exceptions import RayError

from pomarium.cluster.rack import drains
from pomarium.cluster.rack.drains import Drain
from pomarium.cluster.replica.loss import EngineGoneError, EngineMovedError

logger = logging.getLogger(__name__)

LOOK_S = 0.5


class Departure:
    """Whether the engine is to go, and what runs in it.

    Attributes:
        drain: of one of its Macs; None: it stays.
    """

    def __init__(
        self,
        replica: str,
        nodes: Sequence[str],
        read: Callable[[], Sequence[Drain]] = drains.read_all,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`replica`: the engine's name. `nodes`: Ray's ids of those that it and its workers run on. `clock`: Unix
        seconds."""
        self.drain: Drain | None = None
        self._replica, self._nodes, self._read, self._clock = replica, tuple(nodes), read, clock
        self._running = 0
        self._moves = asyncio.Event()
        self._reason = ""

    async def attended(self, answer: Coroutine[Any, Any, None]) -> None:
        """Run `answer` to its end.

        Raises:
            EngineGoneError: the engine is to go, and `answer` was not begun.
            EngineMovedError: it was ended, for the engine goes.
            Exception: what `answer` raises.
        """
        if self.drain is not None:
            answer.close()
            raise EngineGoneError(self.drain.reason)
        self._running += 1
        answering, moves = asyncio.create_task(answer), asyncio.create_task(self._moves.wait())
        try:
            await asyncio.wait({answering, moves}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            moves.cancel()
            if not answering.done():
                answering.cancel()
                await asyncio.wait({answering})
            self._running -= 1
        if answering.cancelled():
            raise EngineMovedError(self._reason)
        await answering

    async def due(self) -> Drain:
        """Wait until the engine is to go and nothing runs in it any more; of which drain. A head that does not answer
        is asked again."""
        while True:
            try:
                found = await asyncio.to_thread(self._read)
            except RayError:
                logger.warning("It is not known which Macs are drained.", exc_info=True)
            else:
                meant = [drain for drain in found if self._replica not in drain.spared]
                self.drain = drains.of_nodes(meant, self._nodes)
            if self.drain is not None and self.drain.until <= self._clock():
                self._reason = self.drain.reason
                self._moves.set()
            if self.drain is not None and not self._running:
                return self.drain
            await asyncio.sleep(LOOK_S)
