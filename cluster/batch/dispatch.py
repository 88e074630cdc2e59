"""Keeps engines busy with requests until all are answered: who asks whom, and what happens when an engine is lost.

    requests --run: as many at once as the engines take--> Engine.answer --> answered(request, answer), as they come
                 ^                                             |
                 '--------- EngineLostError: to another -------'     Engine.start again, meanwhile

A request goes to the engine with the most room. Requests come sorted by their prompts (grouping.py), so each engine
computes a common beginning once. Only what is being asked is in memory: the next request is read when an engine has
room for it.
"""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pomarium.cluster.batch.lines import Answer, Request
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

MOST_LOSSES = 3
"""Engines that a request may be asked of and be lost with, before it is taken to be what they are lost by."""

LOST = Answer(500, b'{"error": {"message": "Each engine that was asked was lost.", "type": "server_error"}}')


class EngineLostError(PomariumError):
    """An engine is gone and did not answer; it can be started again."""


class Engine(Protocol):
    """One engine of the model.

    Attributes:
        room: requests that it takes at once.
    """

    room: int

    async def start(self) -> None:
        """Be ready to answer, for the first time or after a loss. Raises PomariumError if that cannot be."""
        ...

    async def answer(self, request: Request) -> Answer:
        """Raises EngineLostError."""
        ...


@dataclass(eq=False)
class _Seat:
    """What is known of an engine while it works.

    Attributes:
        asked: requests that it has. up: it can be asked. life: how often it was started.
    """

    engine: Engine
    asked: int = 0
    up: bool = False
    life: int = 0
    starting: "asyncio.Task[None] | None" = None


@dataclass
class _Work:
    """What is under way."""

    seats: list[_Seat]
    again: deque[Request] = field(default_factory=deque)
    losses: Counter[int] = field(default_factory=Counter)
    tasks: "set[asyncio.Task[None]]" = field(default_factory=set)


async def run(
    engines: Sequence[Engine],
    requests: Iterator[Request],
    ready: Callable[[], None],
    answered: Callable[[Request, Answer], None],
) -> None:
    """Have all `requests` answered.

    Args:
        ready: told once the first engine is; only then a request is read. answered: told of each request once.

    Raises:
        PomariumError: an engine cannot be started, or whatever `requests` and `answered` raise.
    """
    work = _Work([_Seat(engine) for engine in engines])
    for seat in work.seats:
        _start(work, seat)
    try:
        await _until(work, lambda: any(seat.up for seat in work.seats))
        ready()
        while (request := _next(work, requests)) is not None or work.tasks:
            if request is None:
                await _one(work)
                continue
            await _until(work, lambda: any(_room(seat) > 0 for seat in work.seats))
            seat = max(work.seats, key=_room)
            seat.asked += 1
            work.tasks.add(asyncio.create_task(_ask(work, seat, request, answered)))
    finally:
        left = [*work.tasks, *(seat.starting for seat in work.seats if seat.starting is not None)]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)


def _next(work: _Work, requests: Iterator[Request]) -> Request | None:
    return work.again.popleft() if work.again else next(requests, None)


def _room(seat: _Seat) -> int:
    return seat.engine.room - seat.asked if seat.up else 0


async def _ask(work: _Work, seat: _Seat, request: Request, answered: Callable[[Request, Answer], None]) -> None:
    life = seat.life
    try:
        if not seat.up:  # lost between the choice and this task's turn
            work.again.append(request)
            return
        answer = await seat.engine.answer(request)
    except EngineLostError as error:
        work.losses[request.line] += 1
        if seat.up and seat.life == life:  # else it is back already, and this is the last that is heard of the lost one
            logger.warning("An engine was lost: %s", error)
            seat.up = False
            _start(work, seat)
        if work.losses[request.line] < MOST_LOSSES:
            work.again.append(request)
        else:
            answered(request, LOST)
        return
    finally:
        seat.asked -= 1
    del work.losses[request.line]
    answered(request, answer)


def _start(work: _Work, seat: _Seat) -> None:
    async def start() -> None:
        await seat.engine.start()
        seat.up, seat.life = True, seat.life + 1

    seat.starting = asyncio.create_task(start())


async def _until(work: _Work, condition: Callable[[], bool]) -> None:
    while not condition():
        await _one(work)


async def _one(work: _Work) -> None:
    """Wait until anything ends; raises what it raised."""
    starting = {seat.starting for seat in work.seats if seat.starting is not None}
    done, _ = await asyncio.wait(work.tasks | starting, return_when=asyncio.FIRST_COMPLETED)
    work.tasks -= done
    for seat in work.seats:
        if seat.starting in done:
            seat.starting = None
    if errors := [error for task in done if (error := task.exception()) is not None]:
        raise errors[0]
