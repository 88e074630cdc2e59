"""One end of a sealed connection on an event loop: messages out, messages in, and whether the other end keeps up.

    secret + both ends' salts --sealing.connection_key--> Seal
    send, drain --sealed--> transport --> data_received --opened--> the owner's `received`

No task and no stream stands between a socket and who wants what comes: a message costs its cipher and one call.
"""

import asyncio
import secrets
import socket
from collections.abc import Callable
from typing import cast

from pomarium.cluster.http.sealing import SALT_BYTES, End, Seal, SealedBuffer, WireError, connection_key
from pomarium.worker.address import family

MOST_BYTES = 1 << 20
"""Of a message: what is longer is sent in pieces, and a stranger makes nobody keep more."""

BACKLOG = 1024
"""Connections that wait to be accepted: as many requests may come at once."""

SYSTEM_BYTES = 1 << 18
"""That the system keeps of a connection, each way. Its own choice grows to megabytes for what nobody reads."""


class SealedStream(asyncio.Protocol):
    """A protocol of asyncio's; see `dial` and `listen`. `send` works once `ready` is done."""

    def __init__(self, secret: bytes, end: End, received: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """Args:
        secret: KEY_BYTES that both ends have. received: takes each message, in order. lost: told once it is over.
        """
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._secret, self._end = secret, end
        self._received, self._lost = received, lost
        self._salt, self._far_salt = secrets.token_bytes(SALT_BYTES), b""
        self._transport: asyncio.Transport | None = None
        self._seal: Seal | None = None
        self._buffer: SealedBuffer | None = None
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._salt)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._buffer is None:
            missing = SALT_BYTES - len(self._far_salt)
            self._far_salt, data = self._far_salt + data[:missing], data[missing:]
            if len(self._far_salt) < SALT_BYTES:
                return
            self._buffer = self._agree()
        try:
            for message in self._buffer.messages(data):
                self._received(message)
        except WireError:
            self.close()

    def _agree(self) -> SealedBuffer:
        salts = (self._salt, self._far_salt) if self._end is End.DIALLED else (self._far_salt, self._salt)
        self._seal = Seal(connection_key(self._secret, *salts), self._end)
        if not self.ready.done():
            self.ready.set_result(None)
        return SealedBuffer(self._seal, MOST_BYTES)

    def send(self, message: bytes) -> None:
        """Send one message of at most MOST_BYTES; nothing, if the connection is over."""
        if self._seal is not None and self._transport is not None and not self._transport.is_closing():
            self._transport.write(self._seal.sealed(message))

    async def drain(self) -> None:
        """Wait while the other end takes less than is sent; not beyond the connection's end."""
        if self._room is not None:
            await asyncio.shield(self._room)  # who is cancelled here must not cancel it for others

    def go_on(self) -> None:
        """Nobody waits in `drain` any longer."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)

    def pause_reading(self) -> None:
        """Take nothing more for now, so that the other end has to wait."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Go on."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def close(self) -> None:
        """End the connection; what was sent still leaves, if the other end takes it."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def pause_writing(self) -> None:
        """asyncio's."""
        self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        """asyncio's."""
        self.go_on()
        self._room = None

    def connection_lost(self, _: Exception | None) -> None:
        """asyncio's."""
        self.resume_writing()
        if not self.ready.done():
            self.ready.set_exception(WireError("it closed the connection"))
            self.ready.exception()  # seen: nobody may be waiting
        self._lost()


async def dial(stream: SealedStream, host: str, port: int) -> None:
    """Connect `stream` to whoever listens there, and agree on a key. Raises OSError."""
    connection = _bounded(socket.socket(family(host), socket.SOCK_STREAM))
    try:
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, (host, port))
        await asyncio.get_running_loop().create_connection(lambda: stream, sock=connection)
    except BaseException:
        connection.close()
        raise
    await stream.ready


async def listen(made: Callable[[], SealedStream], host: str) -> tuple[asyncio.Server, int]:
    """Listen on a free port of `host`, and nowhere else; the port. Raises OSError.

    Args:
        made: the end for a connection that comes.
    """
    listener = _bounded(socket.create_server((host, 0), family=family(host), backlog=BACKLOG))
    return await asyncio.get_running_loop().create_server(made, sock=listener), listener.getsockname()[1]


def _bounded(one: socket.socket) -> socket.socket:
    """What is accepted has the listener's bounds."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        one.setsockopt(socket.SOL_SOCKET, option, SYSTEM_BYTES)
    return one
