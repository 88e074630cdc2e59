"""A TCP proxy between two ends of a link that delays, slows, cuts, alters and holds what passes.

client --> LinkProxy.address --pump, per connection and direction--> target
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

HOST = "127.0.0.1"
PIECE = 16 << 10
Alter = Callable[[bytes], bytes]


class LinkProxy:
    """Passes connections on to `target`.

    Attributes:
        address: HOST:PORT to connect to.
        delay_s: added to each piece on its way to the target, and back.
        bytes_per_s: limit towards the target; None for none.
        alter: changes what goes to the target.
        refusing: new connections are closed at once.
        connections: how many were made.
    """

    def __init__(self, target: str) -> None:
        host, port = target.rsplit(":", 1)
        self._target = (host, int(port))
        self._listener = socket.create_server((HOST, 0))
        self.address = f"{HOST}:{self._listener.getsockname()[1]}"
        self.delay_s = 0.0
        self.bytes_per_s: float | None = None
        self.alter: Alter | None = None
        self.refusing = False
        self.connections = 0
        self._open: list[socket.socket] = []
        self._flows = threading.Event()
        self._flows.set()
        self._left: int | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Resets every connection."""
        with self._lock:
            sockets, self._open = self._open, []
        for end in sockets:
            with contextlib.suppress(OSError):
                # linger 0: RST instead of FIN, and nothing buffered is delivered
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                end.shutdown(socket.SHUT_RDWR)

    def cut_after(self, nbytes: int) -> None:
        """Resets every connection once so many more bytes went to the target."""
        self._left = nbytes

    def hold(self) -> None:
        """Nothing passes, nothing is closed: a cable pulled out."""
        self._flows.clear()

    def release(self) -> None:
        """Ends `hold`."""
        self._flows.set()

    def close(self) -> None:
        """Ends everything."""
        self.refusing = True
        self._listener.close()
        self.release()
        self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.connections += 1
                try:
                    far = None if self.refusing else socket.create_connection(self._target, timeout=5)
                except OSError:
                    far = None
                if far is None:
                    near.close()
                    continue
                far.settimeout(None)
                with self._lock:
                    self._open += [near, far]
                for source, sink, forth in ((near, far, True), (far, near, False)):
                    sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    threading.Thread(target=self._pump, args=(source, sink, forth), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(PIECE):
                self._flows.wait()
                if self.delay_s:
                    time.sleep(self.delay_s)
                if forth:
                    if self.bytes_per_s is not None:
                        time.sleep(len(data) / self.bytes_per_s)
                    if self.alter is not None:
                        data = self.alter(data)
                    if self._left is not None:
                        self._left -= len(data)
                        if self._left <= 0:
                            self._left = None
                            self.cut()
                            return
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
