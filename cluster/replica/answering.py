"""A replica's end of its answers: lines to the ingresses that ask, kept for the next request.

    ReplyTo (in the call, from an ingress) --Lines.take--> Line: a connection of this request alone, dialled or idle
    Line: BEGUN --> the request and its body --> HEAD, PIECE ... --> END, LOST, MOVED, GONE or FAILED --> TAKEN: idle
    a line that its ingress keeps (ReplyTo.keeps): the next request comes over it by itself --> BEGUN --> HEAD ...
    Lines, each BEAT_S: ALIVE on every line in use, with what its replica has room for; at once when a request begins

Ray carries the call and its end, which is how Serve counts, drains and cancels requests; of those that come by
themselves it knows nothing, and `drain` waits for them. What is said in between goes over TCP: as items of a Serve
handle each token cost two Ray objects and some six tasks (benchmarks/endpoint.py). A line has one request at a time, so
the socket's own flow control holds up an answer whose client reads slowly, and it alone: vLLM then joins what it has
not sent yet.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace

from pomarium.cluster.http import sealed_stream
from pomarium.cluster.http.answer_frames import (
    PIECE_BYTES,
    Asked,
    Kind,
    frame,
    in_pieces,
    packed_head,
    parted,
    told,
    unpacked_asked,
    unpacked_resume,
)
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.progress import Source
from pomarium.cluster.http.room import Room
from pomarium.cluster.http.sealed_stream import SealedStream
from pomarium.cluster.http.sealing import End
from pomarium.cluster.replica.heartbeat import BEAT_S, SILENCE_S
from pomarium.cluster.replica.loss import EngineFaultError, EngineGoneError, EngineLostError, EngineMovedError

logger = logging.getLogger(__name__)

MOST_IDLE = 64
"""Lines kept for later requests, of all ingresses together."""


@dataclass(frozen=True)
class ReplyTo:
    """Where an answer goes.

    Attributes:
        host, port: where the ingress listens. secret: of its lines. ticket: of the request, TICKET_BYTES.
        keeps: it is for the ingress to say what the line does after this request.
    """

    host: str
    port: int
    secret: bytes
    ticket: bytes
    keeps: bool = False


class LineError(ConnectionError):
    """The ingress cannot be reached, or has gone."""


class Line:
    """The Exchange of one request after another.

    Attributes:
        gone: nobody waits for the answer: the connection is over.
    """

    def __init__(self, reply: ReplyTo) -> None:
        self.gone = asyncio.Event()
        self._stream = SealedStream(reply.secret, End.DIALLED, self._received, self._lost)
        self._came: asyncio.Queue[tuple[Kind, bytes] | None] = asyncio.Queue()
        self._given_up = False
        self._source: Source | None = None

    @classmethod
    async def dial(cls, reply: ReplyTo) -> "Line":
        """A line to whoever listens there. Raises LineError."""
        line = cls(reply)
        try:
            async with asyncio.timeout(SILENCE_S):
                await sealed_stream.dial(line._stream, reply.host, reply.port)
        except (OSError, TimeoutError) as error:
            line.close()
            raise LineError(f"the endpoint at {reply.host}:{reply.port} cannot be reached: {error}") from None
        return line

    async def begin(self, ticket: bytes, replica: str) -> Asked:
        """Say that the request of `ticket` has arrived at `replica`; what it asks. Raises LineError: nobody waits."""
        self._stream.send(frame(Kind.BEGUN, ticket + replica.encode()))
        return await self.asked()

    def take(self) -> None:
        """Say that the request which came by itself has arrived."""
        self._stream.send(frame(Kind.BEGUN))

    async def asked(self) -> Asked:
        """What is asked next. Raises LineError: nothing any more."""
        self._given_up, self._source = False, None
        kind, rest = await self._next()
        if kind is not Kind.ASKED:
            raise LineError(f"the endpoint began a request with {kind.name}")
        asked, resume_bytes = unpacked_asked(rest)
        if not resume_bytes:
            return asked
        resume = bytearray()
        while len(resume) < resume_bytes:
            resume += (await self._next())[1]
        return replace(asked, resume=unpacked_resume(bytes(resume)))

    def tell(self, source: Source) -> None:
        """From now on send with the pieces what `source` has to tell of them."""
        self._source = source

    async def body(self) -> tuple[bytes, bool] | None:
        """See Exchange."""
        try:
            kind, rest = await self._next()
        except LineError:
            return None
        return rest, kind is Kind.BODY

    async def head(self, head: Head) -> None:
        """See Exchange."""
        self._stream.send(frame(Kind.HEAD, packed_head(head)))

    async def piece(self, piece: bytes) -> None:
        """See Exchange."""
        for message in self._messages(piece):
            if not self._given_up:
                self._stream.send(message)
                await self._stream.drain()

    def _messages(self, piece: bytes) -> Iterator[bytes]:
        """A piece, and what is to be told of it."""
        if self._source is not None and not self._source.resumable:
            self._source = None
            yield frame(Kind.UNRESUMABLE)
        if self._source is not None and (groups := self._source.taken()):
            if len(groups) > PIECE_BYTES:  # tokens that a parser kept to itself for long
                yield from in_pieces(Kind.GROUPS, groups)
                groups = b""
            yield told(groups, piece[:PIECE_BYTES])
            piece = piece[PIECE_BYTES:]
        yield from in_pieces(Kind.PIECE, piece)

    def give_up(self) -> None:
        """See Exchange."""
        self._given_up = True
        self._stream.go_on()

    def alive(self, room: Room) -> None:
        """A sign of life. room: of its replica."""
        self._stream.send(frame(Kind.ALIVE, room.packed()))

    async def end(self, kind: Kind, reason: str = "") -> bool:
        """Say how the answer ended; whether the line is free for another one."""
        self._stream.send(frame(kind, reason.encode()))
        with contextlib.suppress(LineError):
            while True:
                kind, _ = await self._next()
                if kind is Kind.TAKEN:
                    return True  # a body that was not read to its end lay before it
        return False

    def close(self) -> None:
        """End the connection."""
        self._stream.close()

    def _received(self, message: bytes) -> None:
        try:
            self._came.put_nowait(parted(message))
        except ValueError:
            self._stream.close()

    def _lost(self) -> None:
        self.gone.set()
        self._came.put_nowait(None)

    async def _next(self) -> tuple[Kind, bytes]:
        """What came next. Raises LineError."""
        came = await self._came.get()
        if came is None:
            self._came.put_nowait(None)  # for whoever asks again
            raise LineError("the endpoint has gone")
        return came


class Lines:
    """A replica's lines."""

    def __init__(self, replica: str, room: Callable[[], Room]) -> None:
        """`replica`: its name, as Serve's router knows it. `room`: what it has room for now."""
        self._replica, self._room = replica, room
        self._idle: dict[tuple[str, int, bytes], list[Line]] = {}
        self._used: set[Line] = set()
        self._kept: dict[asyncio.Task[None], Line] = {}
        self._draining = asyncio.Event()
        self._beating: asyncio.Task[None] | None = None

    async def serve(self, reply: ReplyTo, answer: Callable[[Asked, Line], Awaitable[None]]) -> None:
        """Have the request of `reply` answered; returns when its ingress has the whole answer, or nobody waits for it.

        Args:
            answer: over the line. What it raises, EngineLostError or EngineFaultError, the ingress is told. If the
                ingress keeps the line, later requests on it are answered in the same way.

        Raises:
            LineError: the ingress cannot be reached.
        """
        line = await self.take(reply)
        free = False
        try:
            asked = await line.begin(reply.ticket, self._replica)
            line.alive(self._room())
            free = await _answered(line, asked, answer)
        except LineError:
            pass  # the client left before its request was here
        finally:
            if free and reply.keeps:
                self._keep(line, answer)
            else:
                self.give_back(reply, line, free=free)

    def _keep(self, line: Line, answer: Callable[[Asked, Line], Awaitable[None]]) -> None:
        self._used.discard(line)
        task = asyncio.create_task(self._go_on(line, answer))
        self._kept[task] = line
        task.add_done_callback(self._ended)

    async def _go_on(self, line: Line, answer: Callable[[Asked, Line], Awaitable[None]]) -> None:
        """Answer what comes over `line` until it ends."""
        free = True
        try:
            while free and not self._draining.is_set():
                asked = await line.asked()
                if self._draining.is_set():
                    break  # its ingress sends it elsewhere
                self._used.add(line)
                line.take()
                line.alive(self._room())
                free = await _answered(line, asked, answer)
                self._used.discard(line)
        except LineError:
            pass  # its ingress has closed it
        finally:
            self._used.discard(line)
            line.close()

    def _ended(self, task: "asyncio.Task[None]") -> None:
        del self._kept[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a line failed", exc_info=error)

    async def drain(self) -> None:
        """Take no more requests but by calls; returns when those that came by themselves are answered."""
        self._draining.set()
        for line in self._kept.values():
            if line not in self._used:
                line.close()
        if self._kept:
            await asyncio.wait(self._kept)

    async def take(self, reply: ReplyTo) -> Line:
        """A line to there, for one request. Raises LineError."""
        if self._beating is None:
            self._beating = asyncio.create_task(self._beat())
        idle = self._idle.get((reply.host, reply.port, reply.secret), [])
        while idle:
            line = idle.pop()
            if not line.gone.is_set():
                break
        else:
            line = await Line.dial(reply)
        self._used.add(line)
        return line

    def give_back(self, reply: ReplyTo, line: Line, *, free: bool) -> None:
        """The request is over. free: the line serves another one."""
        self._used.discard(line)
        if free and not line.gone.is_set() and self._make_room():
            self._idle.setdefault((reply.host, reply.port, reply.secret), []).append(line)
        else:
            line.close()

    def _make_room(self) -> bool:
        """Drop idle lines whose ingress has gone; whether one more may be kept."""
        self._idle = {
            place: kept for place, lines in self._idle.items() if (kept := [x for x in lines if not x.gone.is_set()])
        }
        return sum(map(len, self._idle.values())) < MOST_IDLE

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            room = self._room()
            for line in self._used:
                line.alive(room)


def _end_of(fault: EngineFaultError) -> Kind:
    if isinstance(fault, EngineGoneError):
        return Kind.GONE
    if isinstance(fault, EngineMovedError):
        return Kind.MOVED
    return Kind.LOST if isinstance(fault, EngineLostError) else Kind.FAILED


async def _answered(line: Line, asked: Asked, answer: Callable[[Asked, Line], Awaitable[None]]) -> bool:
    """Whether the line is free for another request. Raises LineError: nobody waits for an answer."""
    try:
        await answer(asked, line)
    except EngineFaultError as fault:
        logger.exception("%s %s failed", asked.method, asked.path)
        return await line.end(_end_of(fault), str(fault))
    return await line.end(Kind.END)
