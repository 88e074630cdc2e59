"""Before a model's engines: requests wait here for a slot, or are refused at once. One of each model in each ingress.

    Ledger.supply: slots of the engines, requests of other ingresses --turns.py--> who goes now, who waits, who is 429
    request --Gate.turn: waits--> its engine answers: Turn.begun --> over: the next one goes

What stands in an engine's own queue cannot be ordered, and nobody is told how long it takes. So an engine gets no more
than it has slots for (replica/slots.py). Where no engine runs nothing waits here: what is behind says why there is
none, or holds the request until there is one. A request that has gone keeps its slot until its answer is over, however
many engines it takes.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from pomarium.cluster.endpoint.turns import (
    CALM_S,
    Ahead,
    Held,
    Pace,
    Standing,
    Supply,
    Turns,
    batch_may_go,
    may_go,
    refusal,
)
from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.asgi import Receive, while_there
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.replica.serve_plan import Queue

LOOK_S = 0.1
"""How often it is looked whether there are more slots, while requests wait."""

WEIGHT = 0.1
"""Of the latest answer in what is known of answers."""


@dataclass(frozen=True)
class Asker:
    """Attributes:
    client: that takes turns with others. tokens: of its prompt. batch: people go first.
    """

    client: Hashable
    tokens: int
    batch: bool = False


@dataclass(frozen=True)
class Meter:
    """Who is told of a model's queue: of each request that is refused, and why; of those that wait, and the tokens of
    their prompts; of each that has waited, and how long."""

    refused: Callable[[str], None] = lambda why: None
    waiting: Callable[[int, int], None] = lambda requests, tokens: None
    waited: Callable[[float], None] = lambda seconds: None


FULL, LATE = "full", "late"
"""Why a request is refused: too much is ahead of it; its time has passed."""


class Mean:
    """Of what came of late.

    Attributes:
        value: 0 before there was any. count: of what came.
    """

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        self.value += (value - self.value) * max(WEIGHT, 1.0 / self.count)


class Turn:
    """One request at the engines."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began = clock, clock()
        self.first_s: float | None = None
        self.streams = False

    def begun(self, streams: bool) -> None:
        """The first of its answer is there; all of it, where it does not stream."""
        if self.first_s is None:
            self.first_s, self.streams = self.so_far_s, streams

    @property
    def so_far_s(self) -> float:
        """Since it went."""
        return self._clock() - self._began


class Gate:
    """The gate. `supply`: see Ledger.supply."""

    def __init__(
        self,
        model: str,
        queue: Queue,
        supply: Callable[[], Supply | None],
        meter: Meter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model, self._queue, self._supply, self._meter, self._clock = model, queue, supply, meter, clock
        self._people: Turns[asyncio.Future[None]] = Turns()
        self._batches: Turns[asyncio.Future[None]] = Turns()
        self._held = Held(0, 0)
        self._asked_at = float("-inf")
        self._standing = Standing()
        self._answer_s, self._first_s, self._whole_s = Mean(), Mean(), Mean()
        self._looking: asyncio.Task[None] | None = None
        self._turns: set[Turn] = set()
        self._ended: str | None = None

    @property
    def waiting(self) -> int:
        """Requests."""
        return len(self._people) + len(self._batches)

    def end(self, reason: str) -> None:
        """Nothing waits any more, but is told why: 503."""
        self._ended = reason
        for coming in (*self._people, *self._batches):
            if not coming.done():
                coming.set_exception(self._unavailable(reason))

    def _unavailable(self, reason: str) -> RefusalError:
        return RefusalError(*openai_errors.engine_unavailable(self._model, reason))

    @asynccontextmanager
    async def turn(self, asker: Asker, receive: Receive, kept: bool = False) -> AsyncIterator[Turn]:
        """One request: entered when it is to go to an engine, left when its answer is over.

        Args:
            receive: of the request, whose body has been read.
            kept: it is not refused, however much is ahead of it.

        Raises:
            RefusalError: 429; 503 once it has ended.
            ClientDisconnect: the client left while it waited.
        """
        await self._enter(asker, receive, kept)
        turn = Turn(self._clock)
        self._turns.add(turn)
        try:
            yield turn
        finally:
            self._turns.discard(turn)
            self._hold(asker, -1)
            self._learn(turn)
            self._let_in()

    async def _enter(self, asker: Asker, receive: Receive, kept: bool) -> None:
        """Returns with the request among those that are held."""
        if not asker.batch:
            self._asked_at = self._clock()
        lines = self._batches if asker.batch else self._people
        supply = self._supply()
        if supply is None or (not len(lines) and self._may_go(asker.batch, supply)):
            self._hold(asker, 1)
            return
        if self._ended is not None:
            raise self._unavailable(self._ended)
        bursts = self._standing.look(self._clock(), waiting=True)
        if not kept and (seconds := self._refusal(asker, supply, bursts)) is not None:
            self._meter.refused(FULL)
            raise RefusalError(
                *openai_errors.overloaded(self._model, self.waiting, seconds), {"Retry-After": str(seconds)}
            )
        coming: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        since = self._clock()
        lines.add(asker.client, coming, asker.tokens)
        self._tell()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        try:
            await while_there(receive, coming)
        except BaseException:  # its client has left, its time is over, or all ends
            lines.drop(asker.client, coming)
            if coming.done() and not coming.cancelled() and coming.exception() is None:
                self._hold(asker, -1)  # it was let in at the same moment
                self._let_in()
            self._tell()
            raise
        self._meter.waited(self._clock() - since)

    def _refusal(self, asker: Asker, supply: Supply, bursts: bool) -> int | None:
        lines = self._batches if asker.batch else self._people
        ahead = lines.ahead(asker.client)
        beyond = max(0, self._held.all - supply.slots)
        return refusal(Ahead(ahead.requests + beyond, ahead.tokens), self._queue, supply, self._pace(asker, bursts))

    def _pace(self, asker: Asker, bursts: bool) -> Pace:
        """Batches have time."""
        known = self._answer_s.count and not asker.batch
        at_once = self._held.all or 1
        first = self._first_s if self._first_s.count else self._whole_s
        answer_s = self._answer_s.value
        per_s = at_once / max(answer_s, 1e-6) if known else None
        ends = sorted(max(0.0, answer_s - turn.so_far_s) for turn in self._turns)
        return Pace(per_s, answer_s, first.value, bursts, ends)

    def _learn(self, turn: Turn) -> None:
        if turn.first_s is None:
            return  # no engine has answered it
        self._answer_s.add(turn.so_far_s)
        (self._first_s if turn.streams else self._whole_s).add(turn.first_s)

    def _may_go(self, batch: bool, supply: Supply) -> bool:
        if not batch:
            return may_go(self._held, supply)
        people = bool(self._held.people) or self._clock() - self._asked_at < CALM_S
        return not len(self._people) and batch_may_go(self._held, supply, people)

    def _let_in(self) -> None:
        """Those whose turn it is, as far as there are slots."""
        supply = self._supply()
        for batch, lines in ((False, self._people), (True, self._batches)):
            while len(lines) and (supply is None or self._may_go(batch, supply)):
                coming = lines.pop()
                assert coming is not None
                if not coming.done():  # else its client leaves at this moment
                    self._held = _added(self._held, batch, 1)
                    coming.set_result(None)
        self._tell()

    async def _look(self) -> None:
        """While anything waits: engines come and go, and other ingresses' requests end."""
        while self.waiting:
            self._standing.look(self._clock(), waiting=bool(len(self._people)))
            await asyncio.sleep(LOOK_S)
            self._let_in()
        self._standing.look(self._clock(), waiting=False)

    def _hold(self, asker: Asker, by: int) -> None:
        self._held = _added(self._held, asker.batch, by)

    def _tell(self) -> None:
        self._meter.waiting(self.waiting, self._people.tokens + self._batches.tokens)


def _added(held: Held, batch: bool, by: int) -> Held:
    if batch:
        return replace(held, batches=held.batches + by)
    return replace(held, people=held.people + by)
