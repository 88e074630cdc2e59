"""The door before Serve's proxy, on real sockets before an application that reads its body."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from ray.serve._private import constants
from ray.serve._private.http_util import configure_http_middlewares
from ray.serve.config import HTTPOptions
from uvicorn.protocols.http import auto

from pomarium.cluster.endpoint import local_ray
from pomarium.cluster.http import door, openai_errors, timed_protocol
from pomarium.cluster.http.door import Bounds, Door, readable
from pomarium.worker import settings
from pomarium.worker.errors import SettingsError

BODY, UPLOAD = 100_000, 200_000
PATIENCE_S = 30.0


class Application:
    """Answers with the length of the body, after `think_s` seconds."""

    def __init__(self) -> None:
        self.think_s = 0.0
        self.told: list[str] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size, more = 0, True
        self.headers = scope["headers"]
        while more:
            message = await receive()
            self.told.append(message["type"])
            if message["type"] == "http.disconnect":
                raise ConnectionError("the client left")
            size, more = size + len(message["body"]), message["more_body"]
        await asyncio.sleep(self.think_s)
        content = str(size).encode()
        await send(
            {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(content))]}
        )
        await send({"type": "http.response.body", "body": content})


@contextmanager
def serving(app: Application, timeout: float) -> Iterator[int]:
    bounds = Bounds(BODY, UPLOAD, timeout)
    protocol = type("Timed", (timed_protocol.TimedProtocol,), {"head_timeout": timeout})
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(Door(app, bounds), http=protocol, log_level="critical", timeout_keep_alive=600)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            thread.join()


def post(path: str = "/v1/completions", **headers: object) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()


def sent(port: int, *pieces: bytes) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
    for piece in pieces:
        client.sendall(piece)
    return client


def rest(client: socket.socket) -> bytes:
    """All until the server closes the connection. Raises TimeoutError if it does not."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def status(client: socket.socket) -> int:
    return int(client.recv(1 << 16).split(b" ")[1])


@pytest.fixture(scope="module")
def patient() -> Iterator[tuple[Application, int]]:
    """A server that gives clients more time than any test takes."""
    app = Application()
    with serving(app, 600.0) as port:
        yield app, port


@pytest.mark.parametrize(
    ("path", "size", "expected"),
    [
        ("/v1/completions", BODY, 200),
        ("/v1/completions", BODY + 1, 413),
        ("/v1/files", UPLOAD, 200),
        ("/v1/files/", UPLOAD + 1, 413),
        ("/v1/files/x/content", BODY + 1, 413),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
def test_a_body_is_taken_up_to_its_bound(
    patient: tuple[Application, int], path: str, size: int, expected: int, announced: bool
) -> None:
    app, port = patient
    app.told.clear()
    if announced:
        head, pieces = post(path, Content_Length=size), [b"x" * size]
    else:
        head = post(path, Transfer_Encoding="chunked")
        pieces = [b"%x\r\n%s\r\n" % (size, b"x" * size), b"0\r\n\r\n"]
    with sent(port, head, *pieces) as client:
        assert status(client) == expected
        client.sendall(post(Content_Length=1) + b"x")
        assert status(client) == 200, "the connection goes on behind the rest of a refused body"
    if expected == 413:
        assert app.told == (["http.request"] if announced else [*app.told[:-2], "http.disconnect", "http.request"])


def test_what_is_announced_as_too_large_is_refused_before_it_comes(patient: tuple[Application, int]) -> None:
    with sent(patient[1], post(Content_Length=BODY + 1)) as client:
        head, _, body = client.recv(1 << 16).partition(b"\r\n\r\n")
    assert b" 413 " in head
    assert json.loads(body) == openai_errors.too_large(BODY)[1]


def test_serves_own_paths_are_answered_without_serve(patient: tuple[Application, int]) -> None:
    app, port = patient
    app.told.clear()
    with sent(port, post("/-/routes", Content_Length=0)) as client:
        assert status(client) == 404
    assert app.told == []


def test_slow_heads_and_bodies_end_and_what_is_being_answered_does_not() -> None:
    app = Application()
    with serving(app, 0.5) as port:
        app.think_s = 1.5
        busy = sent(port, post(Content_Length=1), b"x", b"GET / HT")
        half, silent = sent(port, b"GET / HTTP/1.1\r\nHost"), sent(port)
        slow = sent(port, post(Content_Length=9), b"x")
        refused = sent(port, post(Content_Length=BODY + 1), b"x")
        assert rest(half).startswith(b"HTTP/1.1 408")
        assert rest(silent) == b""
        assert b" 408 " in rest(slow).splitlines()[0]
        assert b" 413 " in rest(refused).splitlines()[0], "and then the rest of it is not waited for for ever"
        answer = rest(busy)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in answer, "the half head behind it"


def test_time_is_what_the_client_takes_and_grows_with_what_it_sent() -> None:
    with serving(Application(), 1.0) as port:
        client = sent(port, post(Content_Length=BODY))
        for _ in range(5):  # 100 kB at 16 KiB a second have six seconds more
            client.sendall(b"x" * (BODY // 5))
            time.sleep(0.4)
        assert status(client) == 200


def test_a_head_of_any_size_is_not_kept(patient: tuple[Application, int]) -> None:
    client = sent(patient[1], b"GET / HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):
        for _ in range(1000):
            client.sendall(b"X: " + b"x" * 10_000 + b"\r\n")
        pytest.fail("10 MB of head were taken")
    assert rest(client)[:12] in (b"HTTP/1.1 431", b"")


def test_headers_that_serve_cannot_read_do_not_reach_it() -> None:
    good = [(b"x-request-id", b"a-1"), (b"user-agent", b"caf\xe9"), (b"authorization", b"Bearer \xc3\xa9")]
    bad = [
        (b"x-request-id", b"caf\xe9"),
        (b"x-request-id", b""),
        (b"x-request-id", b"x" * (door.LONGEST_TEXT + 1)),
        (b"x-session-id", b"\xff"),
        (b"x-request-timeout-seconds", b"0.001"),
        (b"x-request-disconnect-disabled", b"?1"),
    ]
    assert readable(good + bad) == good


def test_serve_s_names_are_those_that_are_kept_from_clients() -> None:
    assert {name.decode() for name in door.NOT_FOR_CLIENTS} == {
        constants.SERVE_HTTP_REQUEST_TIMEOUT_S_HEADER, constants.SERVE_HTTP_REQUEST_DISCONNECT_DISABLED_HEADER,
    }  # fmt: skip
    read = {name.decode() for name in door.READ_AS_TEXT}
    assert {constants.SERVE_HTTP_REQUEST_ID_HEADER, constants.SERVE_SESSION_ID} <= read
    assert constants.SERVE_MULTIPLEXED_MODEL_ID in read


def test_serve_s_proxy_takes_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    assert local_ray.environment("s")[door.CALLBACK] == door.IMPORT_PATH
    monkeypatch.setattr(auto, "AutoHTTPProtocol", auto.AutoHTTPProtocol)
    monkeypatch.setattr("ray.serve._private.http_util." + door.CALLBACK, door.IMPORT_PATH)
    monkeypatch.setenv("POMARIUM_MAX_BODY", "1KiB")
    monkeypatch.setenv("POMARIUM_CLIENT_TIMEOUT", "7")
    (found,) = configure_http_middlewares(HTTPOptions()).middlewares
    made = found.cls(Application(), *found.args, **found.kwargs)
    assert isinstance(made, Door)
    assert made._bounds == Bounds(1024, (200 << 20) + door.FORM_BYTES, 7.0)
    config = uvicorn.Config(made)
    config.load()
    assert config.http_protocol_class is timed_protocol.TimedProtocol
    assert timed_protocol.TimedProtocol.head_timeout == 7.0


@pytest.mark.parametrize("value", ["", "0", "-1", "8MB", "1.5MiB", "many"])
def test_a_bound_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="POMARIUM_MAX_BODY"):
        settings.load({"POMARIUM_MAX_BODY": value})
    with pytest.raises(SettingsError, match="POMARIUM_CLIENT_TIMEOUT"):
        settings.load({"POMARIUM_CLIENT_TIMEOUT": value.replace("8MB", "x").replace("1.5MiB", "inf")})
