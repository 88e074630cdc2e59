"""A proxy that the whole environment names: what connects through it is noted, and refused."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pomarium.cluster.node.direct import NAMES, PROXIES


class Proxy:
    """Notes what it is asked for and refuses it."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def environment(self) -> dict[str, str | None]:
        """All variables name it, and none excepts anything from it. None: no such variable."""
        return {**dict.fromkeys(PROXIES, self.url), **dict.fromkeys((*NAMES, "no_grpc_proxy"))}

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
    """This process has its environment."""
    proxy = Proxy()
    for name, value in proxy.environment.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    try:
        yield proxy
    finally:
        proxy.close()
