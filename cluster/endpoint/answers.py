"""An ingress's end of answers: where replicas bring them, and each as an iterator of what came.

    Answers.ask(call, asked, body) --ReplyTo: address, ticket--> call: Serve chooses a replica, which dials, or has a
        line already: BEGUN(ticket) --> ASKED, BODY ... --> HEAD, PIECE ... END --Answer--> Accepted, Head, bytes, ...
    Answers.ask(..., over=a line that a replica keeps open here) --ASKED, BODY ...--> BEGUN --> HEAD, PIECE ... END

The call carries no byte of it. It tells what no line can: that no replica took the request, that it was lost before it
began, that the replica's process is gone. A request that goes over a line and is not taken is called after all. Pieces
that wait together leave together. Of an answer that nobody reads MOST_WAITING bytes are kept; then its replica has to
wait.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from pomarium.cluster.http import sealed_stream
from pomarium.cluster.http.answer_frames import (
    ENDS,
    PIECE_BYTES,
    TICKET_BYTES,
    Asked,
    Kind,
    asking,
    frame,
    in_pieces,
    parted,
    parted_told,
    unpacked_head,
)
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.http.room import Room
from pomarium.cluster.http.sealed_stream import SealedStream
from pomarium.cluster.http.sealing import KEY_BYTES, End
from pomarium.cluster.replica import heartbeat
from pomarium.cluster.replica.answering import ReplyTo
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineFaultError, EngineGoneError, EngineLostError, EngineMovedError

MOST_WAITING = 256 << 10
"""Bytes of an answer that wait for its reader before its replica does."""

MOST_IDLE = 64
"""Lines that are kept for later requests, of a replica."""

ADMIT_S = 10.0
"""For whoever connects to show that it has the secret."""

LAST_WORD_S = 0.5
"""For what a replica had said on its line before its call failed: both tell of a loss, one of them why."""

LOSS_OF = {Kind.LOST: EngineLostError, Kind.MOVED: EngineMovedError, Kind.GONE: EngineGoneError}
"""Messages by which an answer ends with its engine, and what is raised then."""

LOOK_S = 0.5
"""How often it is looked who has been silent for too long."""


@dataclass(frozen=True)
class Accepted:
    """First item of every answer: the request has reached a replica."""


class CutError(Exception):
    """The replica's end of the line went without a last word."""


class Dispatched(Protocol):
    """A request that goes over `line` (dispatch.py), and who is told what becomes of it."""

    @property
    def line(self) -> "ReplicaLine":
        """Idle until now."""
        ...

    def taken(self) -> None:
        """A replica has it."""
        ...

    def over(self) -> None:
        """It has ended, one way or another."""
        ...


class Answer:
    """What became of one request: an async iterator of `Accepted`, `Head`, and the body in pieces.

    Attributes:
        heard: when there was a sign of it last. over: nothing comes any more. begun: a replica is answering it.
        replica: that answers it, or did; "" before it begins.
        resumable: another replica could go on with it.

    Raises, from `anext`: what the call of the replica raises; SilentError; CutError; EngineLostError;
    EngineMovedError; EngineGoneError; EngineFaultError.
    """

    def __init__(self, asked: Asked, body: bytes, *, patient: bool, keeps: bool) -> None:
        """`patient`: however long no replica takes it. `keeps`: its line stays open for this ingress's requests."""
        self.heard = time.monotonic()
        self.over = False
        self.begun = False
        self.keeps = keeps
        self.replica = ""
        self.resumable = True
        before = asked.resume or Resume(0, b"", b"")
        self._messages, self._groups, self._first = before.messages, bytearray(before.groups), before.first
        self._asked, self._body = asked, body
        self._patient = patient
        self._complete = False
        self._came: deque[Accepted | Head | bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._error: Exception | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._line: ReplicaLine | None = None
        self._dispatched: Dispatched | None = None
        self._call_instead: Callable[[], None] | None = None
        self._call: Any = None
        self._watch: asyncio.Future[Any] | None = None

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> Accepted | Head | bytes:
        while not self._came:
            if self._error is not None:
                raise self._error
            if self.over:
                raise StopAsyncIteration
            self._wanted = asyncio.get_running_loop().create_future()
            await self._wanted
        item = self._came.popleft()
        if not isinstance(item, bytes):
            return item
        if self._came:
            item = b"".join([item, *self._came])  # type: ignore[list-item] # what follows bytes is bytes
            self._came.clear()
        self._waiting_bytes = 0
        if self._paused:
            self._paused, self.heard = False, time.monotonic()
            if self._line is not None:
                self._line.stream.resume_reading()
        return item

    def gained(self) -> int:
        """A number that has grown if there is more of it."""
        return len(self._groups) + self._messages

    def resume(self) -> Resume:
        """What another replica needs to go on with it."""
        return Resume(self._messages, bytes(self._groups), self._first)

    def cancel(self) -> None:
        """Nobody waits any more. Harmless once the answer is complete."""
        self._end()
        if self._line is not None:
            self._line.stream.abort()
        if self._watch is not None and not self._watch.done() and not self._complete:
            self._watch.cancel()
            self._call.cancel()

    def silent_for(self, now: float) -> float:
        """Seconds without any sign, of one that should give some. Nothing is heard while its reader is waited for."""
        excused = self.over or self._paused or (self._patient and not self.begun)
        return 0.0 if excused else now - self.heard

    def fail(self, error: Exception) -> None:
        """It ends with this, behind what came."""
        if self.over:
            return
        self._error = error
        self._end()
        self._wake()

    def cut(self) -> None:
        """Its line is gone."""
        if self.over:
            return
        if self.begun or self._call_instead is None:
            self.fail(CutError())
            return
        self._line = None
        self._settle()
        self._call_instead()

    def send_over(self, dispatched: Dispatched, call_instead: Callable[[], None]) -> None:
        """Without a call, unless the line is lost before a replica has it: `call_instead`."""
        self._dispatched, self._call_instead = dispatched, call_instead
        self._line = dispatched.line
        self._line.ask(self, self._asked, self._body)

    def called(self, call: Any) -> None:
        """`call`: of the replica, on its way."""
        self._call = call
        self._watch = asyncio.ensure_future(call)
        self._watch.add_done_callback(self._returned)

    def _returned(self, watch: "asyncio.Future[Any]") -> None:
        if watch.cancelled():
            return
        error = watch.exception()  # asked for also where nobody waits any more, or asyncio complains
        if self.over:
            return
        failure = error if isinstance(error, Exception) else CutError()
        if self._line is None:
            self.fail(failure)
        else:
            asyncio.get_running_loop().call_later(LAST_WORD_S, self.fail, failure)

    def begin(self, line: "ReplicaLine") -> None:
        """A replica has taken it, and answers over `line`."""
        if self._line is None:
            self._line = line
            line.ask(self, self._asked, self._body)
        self.begun, self.heard, self._body = True, time.monotonic(), b""
        self.replica = line.replica
        if self._dispatched is not None:
            self._dispatched.taken()
        self._came.append(Accepted())
        self._wake()

    def take(self, kind: Kind, rest: bytes) -> None:
        """A message on its line."""
        if kind is Kind.TOLD:
            groups, piece = parted_told(rest)
            self._groups += groups
            self._take_piece(piece)
        elif kind is Kind.PIECE:
            self._take_piece(rest)
        elif kind is Kind.HEAD:
            self._came.append(unpacked_head(rest))
        elif kind is Kind.GROUPS:
            self._groups += rest
        elif kind is Kind.UNRESUMABLE:
            self.resumable = False
        elif kind in ENDS:
            self._line = None  # it is another's from now on
            if kind in LOSS_OF:
                self.fail(LOSS_OF[kind](rest.decode()))
            elif kind is Kind.FAILED:
                self.fail(EngineFaultError(rest.decode()))
            else:
                self._complete = True
                self._end()
        self._wake()

    def _take_piece(self, piece: bytes) -> None:
        if not self._messages:
            self._first = piece
        self._messages += 1
        self._came.append(piece)
        self._waiting_bytes += len(piece)
        if self._waiting_bytes > MOST_WAITING and not self._paused and self._line is not None:
            self._paused = True
            self._line.stream.pause_reading()

    def _end(self) -> None:
        self.over = True
        self._settle()

    def _settle(self) -> None:
        if self._dispatched is not None:
            self._dispatched.over()
            self._dispatched = None

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


class ReplicaLine:
    """One replica's connection.

    Attributes:
        answer: that it brings now. replica: whose it is, once it has begun an answer.
    """

    def __init__(self, answers: "Answers") -> None:
        self.stream = SealedStream(answers.secret, End.LISTENED, self._received, self._lost)
        self.answer: Answer | None = None
        self.replica = ""
        self._answers = answers
        self._sending: asyncio.Future[None] | None = None
        self._known = self._keeps = False
        asyncio.get_running_loop().call_later(ADMIT_S, self._shut_out)

    def _shut_out(self) -> None:
        if not self._known:
            self.stream.abort()

    def _received(self, message: bytes) -> None:
        self._known = True
        try:
            kind, rest = parted(message)
            room = Room.unpacked(rest) if kind is Kind.ALIVE else None
        except ValueError:
            self.stream.abort()
            return
        if room is not None:
            self._answers.told(self.replica, room)
        if kind is Kind.BEGUN:
            self._begun(rest)
        elif self.answer is not None:
            self.answer.heard = time.monotonic()
            if kind in LOSS_OF:
                self._answers.lost(self.replica)
            self.answer.take(kind, rest)
            if kind in ENDS:
                self._free()

    def _begun(self, rest: bytes) -> None:
        """rest: nothing, if the request came over this line; else its ticket, and the replica's name."""
        if self.answer is None:
            answer = self._answers.claimed(rest[:TICKET_BYTES])
            if answer is None:
                self.stream.abort()  # nobody waits for it any more
                return
            self.replica, self._keeps = rest[TICKET_BYTES:].decode(), answer.keeps
            answer.begin(self)
        else:
            self.answer.begin(self)

    def ask(self, answer: Answer, asked: Asked, body: bytes) -> None:
        """Have the replica answer this next."""
        self.answer = answer
        for message in asking(asked):
            self.stream.send(message)
        if len(body) > PIECE_BYTES:
            self._sending = asyncio.ensure_future(_send(self.stream, body))
            return
        for message in in_pieces(Kind.BODY, body):
            self.stream.send(message)
        self.stream.send(frame(Kind.ASKED_ALL))

    def _free(self) -> None:
        self.answer = None
        self.stream.resume_reading()
        if self._sending is not None and not self._sending.done():
            self.stream.abort()  # it was answered before all of it was asked
            return
        self._sending = None
        self.stream.send(frame(Kind.TAKEN))
        if self._keeps:
            self._answers.keep(self)

    def _lost(self) -> None:
        self._answers.forget(self)
        if self._sending is not None:
            self._sending.cancel()
        if self.answer is not None:
            self.answer.cut()


class Answers:
    """Where replicas bring answers.

    Attributes:
        secret: of all lines. lines: connections that are open.
    """

    def __init__(
        self,
        host: str,
        lost: Callable[[str], None] = lambda replica: None,
        told: Callable[[str, Room], None] = lambda replica, room: None,
    ) -> None:
        """`host`: of this machine, where replicas reach it. `start` listens there. `lost`: told of each replica that
        says that its engine is dead, or ends. `told`: what each says it has room for."""
        self.lost, self.told = lost, told
        self.secret = secrets.token_bytes(KEY_BYTES)
        self.lines: set[ReplicaLine] = set()
        self._host = host
        self._port = 0
        self._open: dict[bytes, Answer] = {}
        self._idle: dict[str, list[ReplicaLine]] = {}
        self._server: asyncio.Server | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen on a free port. Raises OSError."""
        self._server, self._port = await sealed_stream.listen(self._line, self._host)
        self._looking = asyncio.create_task(self._look())

    def ask(
        self,
        call: Callable[[ReplyTo], Any],
        asked: Asked,
        body: bytes,
        *,
        patient: bool = False,
        keeps: bool = False,
        over: Dispatched | None = None,
    ) -> Answer:
        """Send a request.

        Args:
            call: of `EngineReplica.request`: an awaitable with `cancel`.
            patient: it may take long until a replica takes it.
            keeps: a line that is dialled for it stays open for later ones (`idle`).
            over: an idle line that it goes over; None: by a call.
        """
        answer = Answer(asked, body, patient=patient, keeps=keeps)
        by_call = partial(self._called, answer, call)
        if over is None:
            by_call()
        else:
            answer.send_over(over, by_call)
        return answer

    def _called(self, answer: Answer, call: Callable[[ReplyTo], Any]) -> None:
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._open[ticket] = answer
        answer.called(call(ReplyTo(self._host, self._port, self.secret, ticket, answer.keeps)))

    def idle(self, replica: str) -> "ReplicaLine | None":
        """A line that `replica` keeps open here and nobody uses, for one request."""
        lines = self._idle.get(replica, [])
        return lines.pop() if lines else None

    def forget(self, line: "ReplicaLine") -> None:
        """`line` is over."""
        self.lines.discard(line)
        lines = self._idle.get(line.replica, [])
        if line in lines:
            lines.remove(line)
        if not lines:
            self._idle.pop(line.replica, None)

    def keep(self, line: "ReplicaLine") -> None:
        """`line` is idle from now on."""
        lines = self._idle.setdefault(line.replica, [])
        if len(lines) < MOST_IDLE:
            lines.append(line)
        else:
            line.stream.close()

    def claimed(self, ticket: bytes) -> Answer | None:
        """The request of `ticket`, once; None if nobody waits for it."""
        answer = self._open.pop(ticket, None)
        return None if answer is None or answer.over else answer

    async def close(self) -> None:
        """End it all."""
        if self._server is not None:
            self._server.close()
        if self._looking is not None:
            self._looking.cancel()
        for line in tuple(self.lines):
            line.stream.abort()

    def _line(self) -> SealedStream:
        line = ReplicaLine(self)
        self.lines.add(line)
        return line.stream

    async def _look(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            brought = [line.answer for line in self.lines if line.answer is not None]
            for answer in (*self._open.values(), *brought):
                if answer.silent_for(now) > heartbeat.SILENCE_S:
                    answer.fail(SilentError())
            self._open = {ticket: answer for ticket, answer in self._open.items() if not answer.over}


async def _send(stream: SealedStream, body: bytes) -> None:
    """As the replica takes it."""
    for message in in_pieces(Kind.BODY, body):
        stream.send(message)
        await stream.drain()
    stream.send(frame(Kind.ASKED_ALL))
