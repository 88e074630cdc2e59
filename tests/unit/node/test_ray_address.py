"""A Ray that is not there is named at once."""

import http.server
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import pytest

from pomarium.cluster.endpoint import local_ray
from pomarium.cluster.endpoint.local_ray import RayStartError
from pomarium.cluster.node import ray_address
from pomarium.cluster.node.ray_address import Answer
from pomarium.cluster.replica.serve_plan import ModelPlan, ServePlan
from pomarium.worker.errors import SettingsError


def test_a_listener_answers_until_it_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert ray_address.answers(address)
        assert ray_address.answers(f"ray://{address}")
    assert not ray_address.answers(address)
    assert ray_address.answers("auto"), "left to Ray"


@pytest.mark.timeout(20)
def test_joining_nothing_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    plan = ServePlan((ModelPlan("m"),))
    with pytest.raises(SettingsError, match=rf"^No Ray answers at RAY_ADDRESS={address}: start it or unset"):
        local_ray.join(address, plan)


class Server(threading.Thread):
    """A server of one connection that sends `greeting` to whoever connects, and waits until it is gone."""

    def __init__(self, greeting: bytes) -> None:
        super().__init__(daemon=True)
        self._greeting = greeting
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def run(self) -> None:
        connection, _ = self._listener.accept()
        with connection, self._listener:
            if self._greeting:
                connection.sendall(self._greeting)
            with suppress(ConnectionResetError):  # it left with something unread
                while connection.recv(1024):
                    pass


@pytest.mark.parametrize(
    ("greeting", "answer"),
    [
        (b"\x00\x00\x00\x04\x00\x00\x00\x00\x00", Answer.GRPC),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Answer.OTHER),
        (b"SSH-2.0-OpenSSH_9.6\r\n", Answer.OTHER),
        (b"", Answer.OTHER),
    ],
)
def test_who_listens_is_told_by_the_first_bytes(
    monkeypatch: pytest.MonkeyPatch, greeting: bytes, answer: Answer
) -> None:
    monkeypatch.setattr(ray_address, "GREETING_S", 0.5)
    server = Server(greeting)
    server.start()
    assert ray_address.look(server.address, {}) is answer


def test_a_grpc_server_is_taken_for_ray() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert ray_address.look(f"127.0.0.1:{port}", {}) is Answer.GRPC
        assert ray_address.look(f"ray://127.0.0.1:{port}", {}) is Answer.GRPC
    finally:
        server.stop(None)


def test_what_speaks_tls_is_left_to_ray() -> None:
    server = Server(b"")
    server.start()
    assert ray_address.look(server.address, {"RAY_USE_TLS": "1"}) is Answer.GRPC


@pytest.mark.timeout(20)
def test_joining_a_web_server_is_refused_at_once() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"127.0.0.1:{server.server_port}"
        with pytest.raises(SettingsError, match=rf"^What answers at RAY_ADDRESS={address} is no Ray"):
            local_ray.join(address, ServePlan((ModelPlan("m"),)))
        server.shutdown()


class SlowRay:
    """Stands for `ray.init` on a busy machine: fails so often, with Ray's words."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: int, words: str) -> None:
        self.folders: list[Path] = []
        self.stopped: list[Path] = []
        self.tokens: set[str] = set()
        self._failures, self._words = failures, words
        monkeypatch.setattr(local_ray, "_init", self._init)
        monkeypatch.setattr(local_ray, "stop", self._stop)
        for name in local_ray.environment("s"):
            monkeypatch.setenv(name, "")

    def _init(self, local: local_ray.LocalRay, plan: ServePlan) -> None:
        self.folders.append(local.folder)
        self.tokens.add(os.environ["RAY_AUTH_TOKEN"])
        if len(self.folders) <= self._failures:
            raise Exception(self._words)

    def _stop(self, local: local_ray.LocalRay) -> None:
        self.stopped.append(local.folder)
        local.folder.rmdir()


TIMED_OUT = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


def test_a_slow_ray_is_tried_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SlowRay(monkeypatch, 2, TIMED_OUT)
    local = local_ray.start(ServePlan((ModelPlan("m"),)))
    assert local.folder == ray.folders[2]
    assert ray.stopped == ray.folders[:2]
    local.folder.rmdir()


def test_a_ray_that_stays_slow_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SlowRay(monkeypatch, 9, TIMED_OUT)
    with pytest.raises(RayStartError, match=r"^Ray did not start on this machine: 3 times .* too busy\. Try again"):
        local_ray.start(ServePlan((ModelPlan("m"),)))
    assert len(ray.stopped) == local_ray.ATTEMPTS
    assert len(ray.tokens) == 1, "Ray remembers the first that it reads"


def test_a_ray_that_fails_otherwise_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SlowRay(monkeypatch, 9, "no such file\nand more")
    with pytest.raises(RayStartError, match=r"^Ray did not start on this machine: Exception: no such file\.$"):
        local_ray.start(ServePlan((ModelPlan("m"),)))
    assert len(ray.stopped) == 1
