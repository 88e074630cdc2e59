"""An ingress's end of answers: where replicas bring them, and each as an iterator of what came.

    Answers.ask(call, asked, body) --ReplyTo: address, ticket--> call: Serve chooses a replica, which dials, or has a
        line already: BEGUN(ticket) --> ASKED, BODY ... --> HEAD, PIECE ... END --Answer--> Accepted, Head, bytes, ...

The call carries no byte of it. It tells what no line can: that no replica took the request, that it was lost before it
began, that the replica's process is gone. Pieces that wait together leave together. Of an answer that nobody reads
MOST_WAITING bytes are kept; then its replica has to wait.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pomarium.cluster.http import sealed_stream
from pomarium.cluster.http.answer_frames import (
    ENDS,
    TICKET_BYTES,
    Asked,
    Kind,
    frame,
    in_pieces,
    packed_asked,
    parted,
    unpacked_head,
)
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.sealed_stream import SealedStream
from pomarium.cluster.http.sealing import KEY_BYTES, End
from pomarium.cluster.replica import heartbeat
from pomarium.cluster.replica.answering import ReplyTo
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineFaultError, EngineLostError

MOST_WAITING = 256 << 10
"""Bytes of an answer that wait for its reader before its replica does."""

ADMIT_S = 10.0
"""For whoever connects to show that it has the secret."""

LAST_WORD_S = 0.5
"""For what a replica had said on its line before its call failed: both tell of a loss, one of them why."""

LOOK_S = 0.5
"""How often it is looked who has been silent for too long."""


@dataclass(frozen=True)
class Accepted:
    """First item of every answer: the request has reached a replica."""


class CutError(Exception):
    """The replica's end of the line went without a last word."""


class Answer:
    """What became of one request: an async iterator of `Accepted`, `Head`, and the body in pieces.

    Raises, from `anext`: what the call of the replica raises; SilentError; CutError; EngineLostError; EngineFaultError.
    """

    def __init__(self, asked: Asked, body: bytes, *, patient: bool) -> None:
        """`patient`: however long no replica takes it."""
        self.heard = time.monotonic()
        self.over = False
        self._asked, self._body = asked, body
        self._patient = patient
        self._complete = False
        self._came: deque[Accepted | Head | bytes] = deque()
        self._waiting_bytes = 0
        self._paused = False
        self._error: Exception | None = None
        self._wanted: asyncio.Future[None] | None = None
        self._line: ReplicaLine | None = None
        self._call: Any = None
        self._watch: asyncio.Future[Any] | None = None

    @property
    def begun(self) -> bool:
        """Whether a replica is answering it."""
        return self._line is not None

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

    def cancel(self) -> None:
        """Nobody waits any more. Harmless once the answer is complete."""
        self.over = True
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
        self.over = True
        self._wake()

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
        """A replica has taken it: it is told what is asked."""
        self._line, self.heard = line, time.monotonic()
        line.stream.send(frame(Kind.ASKED, packed_asked(self._asked)))
        line.sending = asyncio.ensure_future(_send(line.stream, self._body))
        self._body = b""
        self._came.append(Accepted())
        self._wake()

    def take(self, kind: Kind, rest: bytes) -> None:
        """A message on its line."""
        if kind is Kind.PIECE:
            self._came.append(rest)
            self._waiting_bytes += len(rest)
            if self._waiting_bytes > MOST_WAITING and not self._paused and self._line is not None:
                self._paused = True
                self._line.stream.pause_reading()
        elif kind is Kind.HEAD:
            self._came.append(unpacked_head(rest))
        else:
            self._end(kind, rest)
        self._wake()

    def _end(self, kind: Kind, rest: bytes) -> None:
        """Its line is another's from now on."""
        if kind in ENDS:
            self._line = None
        if kind is Kind.LOST:
            self.fail(EngineLostError(rest.decode()))
        elif kind is Kind.FAILED:
            self.fail(EngineFaultError(rest.decode()))
        elif kind is Kind.END:
            self.over = self._complete = True

    def _wake(self) -> None:
        if self._wanted is not None and not self._wanted.done():
            self._wanted.set_result(None)


class ReplicaLine:
    """One replica's connection.

    Attributes:
        answer: that it brings now. sending: the request's body.
    """

    def __init__(self, answers: "Answers") -> None:
        self.stream = SealedStream(answers.secret, End.LISTENED, self._received, self._lost)
        self.sending: asyncio.Future[None] | None = None
        self._answers = answers
        self.answer: Answer | None = None
        self._known = False
        asyncio.get_running_loop().call_later(ADMIT_S, self._shut_out)

    def _shut_out(self) -> None:
        if not self._known:
            self.stream.abort()

    def _received(self, message: bytes) -> None:
        self._known = True
        try:
            kind, rest = parted(message)
        except ValueError:
            self.stream.abort()
            return
        if kind is Kind.BEGUN:
            self.answer = self._answers.claimed(rest)
            if self.answer is None:
                self.stream.abort()  # nobody waits for it any more
            else:
                self.answer.begin(self)
        elif self.answer is not None:
            self.answer.heard = time.monotonic()
            self.answer.take(kind, rest)
            if kind in ENDS:
                self._free()

    def _free(self) -> None:
        self.answer = None
        self.stream.resume_reading()
        if self.sending is not None and not self.sending.done():
            self.stream.abort()  # it was answered before all of it was asked
        else:
            self.stream.send(frame(Kind.TAKEN))

    def _lost(self) -> None:
        self._answers.lines.discard(self)
        if self.sending is not None:
            self.sending.cancel()
        if self.answer is not None:
            self.answer.fail(CutError())


class Answers:
    """Where replicas bring answers.

    Attributes:
        secret: of all lines. lines: connections that are open.
    """

    def __init__(self, host: str) -> None:
        """`host`: of this machine, where replicas reach it. `start` listens there."""
        self.secret = secrets.token_bytes(KEY_BYTES)
        self.lines: set[ReplicaLine] = set()
        self._host = host
        self._port = 0
        self._open: dict[bytes, Answer] = {}
        self._server: asyncio.Server | None = None
        self._looking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen on a free port. Raises OSError."""
        self._server, self._port = await sealed_stream.listen(self._line, self._host)
        self._looking = asyncio.create_task(self._look())

    def ask(self, call: Callable[[ReplyTo], Any], asked: Asked, body: bytes, *, patient: bool = False) -> Answer:
        """Send a request.

        Args:
            call: of `EngineReplica.request`: an awaitable with `cancel`.
            patient: it may take long until a replica takes it.
        """
        ticket = secrets.token_bytes(TICKET_BYTES)
        answer = Answer(asked, body, patient=patient)
        self._open[ticket] = answer
        answer.called(call(ReplyTo(self._host, self._port, self.secret, ticket)))
        return answer

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
