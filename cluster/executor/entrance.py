"""How an engine and its worker come to a wire: whoever shows the key is let in, once.

    worker: Entrance(host) --port and key, over the control stream--> engine: dial
            .admit(key) <-------an empty message, sealed-------------------'

A stranger who connects, says something else or nothing, learns nothing and holds up nobody.
"""

import contextlib
import socket
import threading
import time
from concurrent.futures import Future

from pomarium.cluster.executor.wire import Wire
from pomarium.cluster.http.sealing import End
from pomarium.worker.address import family

ADMIT_S = 10.0
"""For the engine to connect and to show the key: it was told where a moment ago."""
LOOK_S = 0.1
"""How often an entrance looks whether it may close."""


class Entrance:
    """Listens on a free port of `host`, and nowhere else, until `admit` is over. Raises OSError."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0), family=family(host))
        self.port: int = self._listener.getsockname()[1]

    def admit(self, key: bytes) -> Wire:
        """The wire to the first that shows `key`; the others are shut out. Raises TimeoutError after ADMIT_S."""
        admitted: Future[Wire] = Future()
        threading.Thread(target=self._accept, args=(key, admitted), name="entrance", daemon=True).start()
        return admitted.result(ADMIT_S)

    def _accept(self, key: bytes, admitted: "Future[Wire]") -> None:
        deadline = time.monotonic() + ADMIT_S
        with self._listener:
            self._listener.settimeout(LOOK_S)
            while not admitted.done() and time.monotonic() < deadline:
                with contextlib.suppress(OSError):  # nobody came, or is gone again
                    connection, _ = self._listener.accept()
                    examined = threading.Thread(target=_examine, args=(connection, key, admitted), daemon=True)
                    examined.start()


def _examine(connection: socket.socket, key: bytes, admitted: "Future[Wire]") -> None:
    try:
        connection.settimeout(ADMIT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(connection, key, End.LISTENED)
        wire.receive(most=0)
        connection.settimeout(None)
    except OSError:
        connection.close()
    else:
        admitted.set_result(wire)


def dial(host: str, port: int, key: bytes, timeout_s: float) -> Wire:
    """The engine's end of the wire to the worker that listens there. Raises OSError."""
    connection = socket.create_connection((host, port), timeout_s)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    wire = Wire(connection, key, End.DIALLED)
    wire.send(b"")
    return wire
