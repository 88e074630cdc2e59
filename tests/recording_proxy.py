"""A proxy that the whole environment names: what connects through it is noted, and refused."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pomarium.cluster.rack.direct import NAMES, PROXIES


class Proxy:
    """Notes what it is asked for and refuses it."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(4096).partition(b"\r\n")[0])
                connection.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    def close(self) -> None:
        self._listener.close()


@contextmanager
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """All variables name it, and none excepts anything from it."""
    proxy = Proxy()
    for name in PROXIES:
        monkeypatch.setenv(name, proxy.url)
    for name in (*NAMES, "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield proxy
    finally:
        proxy.close()
