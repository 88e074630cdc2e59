"""Connections that do not wait for ever, and whose end is noticed: uvicorn's HTTP protocol with a bound on heads.

    bytes --> TimedProtocol: is a head whole in time, is it small enough? --> uvicorn's HttpToolsProtocol --> Door

uvicorn bounds idle connections between two requests (timeout_keep_alive) and nothing else: neither the first head on
a connection, nor one that has begun. Bodies are bounded where they are asked for (door.py), but for the rest of one
that was refused: it is read so that the answer arrives, and no longer than a head may take.

uvicorn reads no more of a connection once another request has come behind the one that is answered, and so does not see
that the client has left; and tells the last request alone when it does.
"""

import asyncio
from enum import Enum

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_HEAD_BYTES = 64 << 10
"""Beyond what is read at once with its first byte, which may be the end of something else."""

MOST_BEHIND = 16
"""Requests behind the one that is answered, on one connection; with more of them nothing is read until it is."""

TOO_SLOW = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


class Part(Enum):
    """What the next byte of a connection belongs to."""

    NONE = "none"
    HEAD = "head"
    BODY = "body"


class TimedProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        head_timeout: seconds. uvicorn makes connections by their class, so it is a class's own.
    """

    head_timeout = 30.0

    _part = Part.NONE
    _head_bytes = 0
    _deadline: asyncio.TimerHandle | None = None
    _answered: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        """asyncio's: the first head has to come."""
        super().connection_made(transport)
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's: the request that is answered is told, whatever came behind it."""
        self._disarm()
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        before = self._part
        super().data_received(data)
        upgraded = self.transport.get_protocol() is not self  # it is a websocket's
        if upgraded or self.transport.is_closing() or self._answering():
            self._disarm()
        elif self._deadline is None:
            self._arm()
        if before is self._part is Part.HEAD and not upgraded:
            self._head_bytes += len(data)
            if self._head_bytes > MOST_HEAD_BYTES:
                self._end(b"" if self._answering() else TOO_LARGE)

    def on_message_begin(self) -> None:
        """The parser's: a head begins."""
        self._part, self._head_bytes = Part.HEAD, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The parser's: a body follows, which may be empty."""
        self._part = Part.BODY
        super().on_headers_complete()
        if 0 < len(self.pipeline) <= MOST_BEHIND:
            self.flow.resume_reading()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """uvicorn's: it is this one's turn."""
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def on_message_complete(self) -> None:
        """The parser's: another head may follow."""
        self._part = Part.NONE
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """uvicorn's: the connection is idle, unless a head has begun or the rest of a refused body follows."""
        super().on_response_complete()
        self._disarm()
        if self._part is not Part.NONE and not self.transport.is_closing() and not self._answering():
            self._arm()

    def _answering(self) -> bool:
        """Whether a request is being answered, which takes its time."""
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._deadline = self.loop.call_later(self.head_timeout, self._late)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        self._end(TOO_SLOW if self._part is Part.HEAD else b"")

    def _end(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()
