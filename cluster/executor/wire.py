"""Whole messages over one TCP connection, sealed: how calls and reports pass between an engine and a worker.

    message --http/sealing.py--> length, sealed message --socket--> opened --> message

Both ends have the key from the control stream, where TLS carried it. Sending and receiving share nothing, so a thread
may wait for a message while another one sends.

A socket and not a stream of gRPC's: between the thread that calls and the one that executes it takes no thread of
Python's but the one that receives. A step's two calls and answer take 90 us of processor time at both ends together,
and 606 over a stream (benchmarks/hops.py, two cores of an EPYC).
"""

import contextlib
import socket
import threading

from pomarium.cluster.http.sealing import LENGTH, End, Seal, WireError, checked_length

MAX_MESSAGE_BYTES = 1 << 30
"""A pickled call or result. Requests of 1 M tokens take 5 MB; anything near this limit is a fault."""

_PIECE, _MOST_AT_ONCE = 1 << 16, 1 << 20
"""Bytes asked of the socket at a time: memory for a message is taken as it comes, not as it is announced."""


class Wire:
    """One end of a connection. `send` may be called from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket, key: bytes, end: End) -> None:
        """`key`: KEY_BYTES, of this connection alone."""
        self._socket = connection
        self._seal = Seal(key, end)
        self._sending = threading.Lock()
        self._buffer = bytearray()

    def send(self, message: bytes) -> None:
        """Send a message whole; waits while the other end takes nothing.

        Raises OSError: the connection is over, or the message has more than MAX_MESSAGE_BYTES.
        """
        if len(message) > MAX_MESSAGE_BYTES:
            raise WireError(f"a message of {len(message)} bytes is not sent: {MAX_MESSAGE_BYTES} are the most")
        with self._sending:
            self._socket.sendall(self._seal.sealed(message))

    def receive(self, most: int = MAX_MESSAGE_BYTES) -> bytes:
        """The next message, of at most `most` bytes. Raises OSError: no more can be received."""
        self._fill(LENGTH.size)
        end = LENGTH.size + checked_length(self._buffer, most)
        self._fill(end)
        sealed = bytes(memoryview(self._buffer)[LENGTH.size : end])
        del self._buffer[:end]
        return self._seal.opened(sealed)

    def cut(self) -> None:
        """End the connection, from any thread: who sends or receives raises."""
        with contextlib.suppress(OSError):  # the other end was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and give its descriptor back: for the thread that receives, when nobody else does."""
        self.cut()
        with self._sending:  # a descriptor in use must not become another file's
            self._socket.close()

    def _fill(self, length: int) -> None:
        """Receive until the buffer holds `length` bytes."""
        while (missing := length - len(self._buffer)) > 0:
            piece = self._socket.recv(min(max(missing, _PIECE), _MOST_AT_ONCE))
            if not piece:
                raise WireError("it closed the connection")
            self._buffer += piece
