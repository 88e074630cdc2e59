"""One request's answer, from as many replicas as it takes: a client notices no more than a pause.

    Answer (answers.py): Accepted, Head, pieces --Continued--> the same, once each --> relay.py
        `-- its replica is lost --> policy: again? --Resume--> the next Answer: what is missing of the pieces

A stream goes on behind the piece that came last: the next replica shows the tokens again that led there
(engine/resumption.py) and leaves out those pieces. Of an answer that comes as a whole the client has nothing yet, so it
is begun anew. A request that no living engine had taken is sent to another replica at once, and waits for none: who
asks next is told why there is none, and so is this one.

What a drained Mac's engine leaves to others (EngineMovedError) goes on in the same way, and counts as no loss.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from pomarium.cluster.endpoint import holding
from pomarium.cluster.endpoint.answers import Accepted, Answer, CutError
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import (
    EVENT_STREAM,
    EngineFaultError,
    EngineGoneError,
    EngineLostError,
    EngineMovedError,
)
from pomarium.cluster.replica.serve_plan import Limits

logger = logging.getLogger(__name__)

LOOK_S = 0.25
"""How often another replica is asked while there is none."""

UNTAKEN = 4
"""Replicas that are asked before a request which none has taken is refused."""

KEPT_BODY = 4 << 20
"""Bytes of a request's body that are kept to send it again: a larger one ends with its replica."""

LOSSES = (RayActorError, CutError, EngineLostError, SilentError)
"""How an answer ends with its replica."""

ABSENCES = (NoReplicaError, DeploymentUnavailableError)
"""There is no replica to begin one."""


class EndpointEndsError(Exception):
    """The endpoint is being stopped, and its answers with it."""


def hopeless(gains: Sequence[int], limits: Limits) -> bool:
    """Whether a request is given up.

    Args:
        gains: of each replica that it has lost, how much that one had added to its answer. Two in a row that added
            nothing may have died of it.
    """
    return len(gains) > limits.times or (len(gains) > 1 and not any(gains[-2:]))


class Continued:
    """An async iterator of `Accepted`, `Head` and pieces, as Answer is one.

    Raises, from `anext`: what Answer raises, of the loss that ended it; EndpointEndsError.
    """

    def __init__(
        self,
        name: str,
        first: Answer,
        again: Callable[[Resume | None], Answer] | None,
        limits: Limits,
        state: Callable[[], Awaitable[State]],
        lost: Callable[[str], None],
        resumed: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        """Args:
        name: of the request, for the log. first: its first answer. again: sends it once more; None: it is not kept.
        state: of its model's deployment. lost: told of each replica that it loses. resumed: told how long its client
            had to wait for the next.
        """
        self._name, self._answer, self._ask, self._limits = name, first, again, limits
        self._state, self._tell_lost, self._tell_resumed = state, lost, resumed
        self._accepted = False
        self._head: Head | None = None
        self._whole: list[bytes] | None = None
        self._ready: list[Head | bytes] = []
        self._taken = False
        self._gains: list[int] = []
        self._had = 0
        self._untaken = 0
        self._cancelled = self._ends = False
        self._loss: Exception | None = None
        self._lost_at = 0.0

    def __aiter__(self) -> "Continued":
        return self

    async def __anext__(self) -> Accepted | Head | bytes:
        while not self._ready:
            try:
                item = await (anext(self._answer) if self._loss is None else self._waited())
            except LOSSES as loss:
                await self._again(loss)
            except ABSENCES:
                if self._loss is None:
                    raise
                if not self._taken:
                    raise self._loss from None
                await self._ask_later()
            except EngineFaultError as fault:
                if self._loss is None:
                    raise
                raise self._loss from fault
            except StopAsyncIteration:
                if self._whole is None:
                    raise
                self._ready, self._whole = [self._head, *self._whole], None  # type: ignore[list-item]
            else:
                if (passed := self._passed(item)) is not None:
                    return passed
        return self._ready.pop(0)

    def cancel(self) -> None:
        """Nobody waits any more. Harmless once the answer is complete."""
        if not self._cancelled:  # Serve would raise once more what kept it from sending the request
            self._cancelled = True
            self._answer.cancel()

    def end(self) -> None:
        """The endpoint is being stopped: no more of it comes than is here already."""
        self._ends = True
        self._answer.fail(EndpointEndsError())

    def _check(self) -> None:
        """Raises EndpointEndsError where nobody is to go on with it."""
        if self._ends:
            raise EndpointEndsError

    def _passed(self, item: Accepted | Head | bytes) -> Accepted | Head | bytes | None:
        """What of an item is news to the client."""
        if isinstance(item, Accepted):
            first, self._accepted = not self._accepted, True
            return item if first else None
        if isinstance(item, Head):
            self._back()
            self._head = item
            if item.media_type.startswith(EVENT_STREAM):
                return item
            self._whole = []
            return None
        self._back()
        if self._whole is None:
            return item
        self._whole.append(item)
        return None

    def _back(self) -> None:
        """The next replica has begun."""
        if self._loss is None or not self._taken:
            self._loss = None
            return
        waited = time.monotonic() - self._lost_at
        logger.warning("%s went on at %s; its client waited %.1f s.", self._name, self._answer.replica, waited)
        self._tell_resumed(waited)
        self._loss = None

    async def _waited(self) -> Accepted | Head | bytes:
        """The next item of a replica that has nothing to show yet. Raises the loss if none begins in time."""
        if self._answer.begun:
            return await anext(self._answer)
        left = self._lost_at + self._limits.wait_s - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                return await anext(self._answer)
        except TimeoutError:
            raise self._late() from None

    async def _again(self, loss: Exception) -> None:
        """Have another replica answer. Raises the loss if none is to."""
        self._check()
        answer = self._answer
        answer.cancel()
        if answer.replica:
            self._tell_lost(answer.replica)
        if not isinstance(loss, EngineGoneError) and answer.begun:
            had = answer.gained()
            if not isinstance(loss, EngineMovedError):
                self._gains.append(had - self._had)
            self._had = had
            self._taken, self._untaken = True, 0
        else:
            self._untaken += 1
        if self._loss is None:
            self._loss, self._lost_at = loss, time.monotonic()
        ends_with_it = self._ask is None or not self._limits.times or (self._streams and not answer.resumable)
        if ends_with_it or (not self._taken and self._untaken >= UNTAKEN):
            raise self._loss
        if hopeless(self._gains, self._limits):
            logger.error("%s is given up: %d engines were lost while they answered it.", self._name, len(self._gains))
            raise self._loss
        if self._untaken:
            await self._ask_later()
        else:
            self._send()

    async def _ask_later(self) -> None:
        """Ask for a replica once more, after a pause. Raises the loss if there is no hope of one."""
        await asyncio.sleep(LOOK_S)
        self._check()
        waited = time.monotonic() - self._lost_at
        if waited > self._limits.wait_s:
            raise self._late()
        if (reason := holding.verdict(await self._state(), waited, 0.0)) is not None:
            raise self._given_up(reason)
        self._send()

    def _late(self) -> Exception:
        return self._given_up(f"no other took over within {self._limits.wait_s:g} s")

    def _given_up(self, reason: str) -> Exception:
        self.cancel()
        said = str(self._loss)
        return EngineLostError(f"{said}; {reason}" if said else reason)

    @property
    def _streams(self) -> bool:
        """The client has the beginning."""
        return self._head is not None and self._whole is None

    def _send(self) -> None:
        assert self._ask is not None
        if self._streams:
            self._answer = self._ask(self._answer.resume())
        else:
            self._whole, self._had = None, 0
            self._answer = self._ask(None)
