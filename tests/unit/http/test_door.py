"""The HTTP server and its door, on real sockets before an application that reads its body."""

import asyncio
import contextlib
import json
import resource
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from pomarium.cluster.http import door, openai_errors, request_log, timed_protocol
from pomarium.cluster.http.asgi import Message, while_there
from pomarium.cluster.http.door import Bounds
from pomarium.cluster.http.http_server import HttpServer
from pomarium.cluster.http.timed_protocol import TimedProtocol
from pomarium.cluster.machine import descriptors, listening
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
def serving(
    app: Any, timeout: float, counted: list[tuple[str, str, int]] | None = None, origins: Sequence[str] = ()
) -> Iterator[int]:
    """The port of an HttpServer in a thread; it is drained with the context."""
    listener = listening.listener("127.0.0.1", 0)
    port: int = listener.getsockname()[1]
    over = threading.Event()

    def count(method: str, path: str, status: int) -> None:
        if counted is not None:
            counted.append((method, path, status))

    async def serve() -> None:
        server = HttpServer(app, listener, Bounds(BODY, UPLOAD, timeout), count, origins)
        await server.start()
        started.set()
        await asyncio.to_thread(over.wait)
        await server.drain()
        with pytest.raises(RuntimeError, match="has ended"):
            server.check()

    started = threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert started.wait(PATIENCE_S)
        yield port
    finally:
        over.set()
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


def answer(client: socket.socket) -> tuple[int, bytes, bytes]:
    """Status, head and body of the next answer, however it comes in pieces."""
    came = b""
    while b"\r\n\r\n" not in came:
        came += piece if (piece := client.recv(1 << 16)) else pytest.fail(f"cut: {came!r}")
    head, _, body = came.partition(b"\r\n\r\n")
    (size,) = [int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
    while len(body) < size:
        body += piece if (piece := client.recv(1 << 16)) else pytest.fail(f"cut: {body!r}")
    return int(head.split(b" ")[1]), head, body


def status(client: socket.socket) -> int:
    return answer(client)[0]


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


def test_anthropic_s_clients_read_their_own_errors_at_the_door(patient: tuple[Application, int]) -> None:
    _, port = patient
    with sent(port, post("/v1/messages", Content_Length=BODY + 1)) as client:
        refused, _, body = answer(client)
    assert (refused, json.loads(body)["error"]["type"]) == (413, "request_too_large")
    assert json.loads(body)["error"]["message"] == openai_errors.too_large(BODY)[1]["error"]["message"]


def test_what_is_announced_as_too_large_is_refused_before_it_comes(patient: tuple[Application, int]) -> None:
    with sent(patient[1], post(Content_Length=BODY + 1)) as client:
        refused, _, body = answer(client)
    assert refused == 413
    assert json.loads(body) == openai_errors.too_large(BODY)[1]


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
        answered = rest(busy)
        assert answered.startswith(b"HTTP/1.1 200")
        assert b"HTTP/1.1 408" in answered, "the half head behind it"


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


@pytest.mark.parametrize("given", [b"caf\xe9", b"", b"x" * (request_log.LONGEST_ID + 1), b"a\tb"])
def test_a_request_id_that_cannot_be_shown_is_replaced(patient: tuple[Application, int], given: bytes) -> None:
    app, port = patient
    with sent(
        port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nX-Request-Id: " + given + b"\r\n\r\n"
    ) as client:
        _, head, _ = answer(client)
    (made,) = [value for name, value in app.headers if name == b"x-request-id"]
    assert str(uuid.UUID(made.decode())).encode() == made
    assert b"x-request-id: " + made in head


def test_a_request_id_comes_back_and_each_request_is_counted() -> None:
    counted: list[tuple[str, str, int]] = []
    with serving(Application(), 600.0, counted) as port:
        with sent(port, post(X_Request_Id="mine", Content_Length=0)) as client:
            assert b"x-request-id: mine" in answer(client)[1]
        with sent(port, post("/v1/files", Content_Length=UPLOAD + 1)) as client:
            assert status(client) == 413
    assert counted == [("POST", "/v1/completions", 200), ("POST", "/v1/files", 413)]


PAGE, OTHER = "https://chat.example", "https://other.example"


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [((), PAGE, None), ((PAGE,), PAGE, PAGE), ((PAGE,), OTHER, None), (("*",), OTHER, "*")],
)
def test_pages_of_other_origins_may_ask_where_they_are_let(
    origins: Sequence[str], origin: str, allowed: str | None
) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, content-type"}
    with serving(Application(), 600.0, origins=origins) as port:
        with sent(port, post(Origin=origin, Content_Length=BODY + 1)) as client:
            refused, head, _ = answer(client)
        assert (refused, header(head, b"access-control-allow-origin")) == (413, allowed), "errors are read, too"
        before = post(Origin=origin, Content_Length=0, **asks).replace(b"POST", b"OPTIONS", 1)
        with sent(port, before) as client:
            _, head, _ = answer(client)
        assert header(head, b"access-control-allow-origin") == allowed
        if allowed is not None:
            assert header(head, b"access-control-allow-headers") == asks["Access_Control_Request_Headers"]


def header(head: bytes, name: bytes) -> str | None:
    lines = [line.partition(b": ") for line in head.split(b"\r\n")]
    return next((value.decode() for found, _, value in lines if found.lower() == name), None)


def test_what_runs_is_answered_before_the_server_ends_and_nobody_else_is() -> None:
    app = Application()
    app.think_s = 1.0
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(serving(app, 600.0))
        idle = sent(port)
        busy = sent(port, post(Content_Length=1), b"x")
        while not app.told:
            time.sleep(0.01)
        stack.close()
        assert rest(busy).startswith(b"HTTP/1.1 200")
        assert rest(idle) == b""
    with pytest.raises(ConnectionRefusedError):
        sent(port)


def test_a_thousand_idle_connections_are_kept_and_are_in_nobody_s_way(patient: tuple[Application, int]) -> None:
    _, port = patient
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limit)
        descriptors.raise_limit()
        idle = [stack.enter_context(sent(port, post(Content_Length=1), b"x")) for _ in range(1000)]
        assert {status(client) for client in idle} == {200}
        with sent(port, post(Content_Length=3), b"new") as client:
            assert answer(client)[2] == b"3"
        for client in idle:
            client.sendall(post(Content_Length=2) + b"xy")
        assert {answer(client)[2] for client in idle} == {b"2"}, "each goes on where it was"


def test_a_client_that_leaves_ends_the_work_for_it() -> None:
    ended = threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def work() -> None:
            try:
                await asyncio.sleep(PATIENCE_S)
            finally:
                await asyncio.sleep(0.01)
                ended.set()

        await receive()
        with pytest.raises(ClientDisconnect):
            await while_there(receive, work())
        assert ended.is_set(), "its end is waited for"

    with serving(app, 600.0) as port:
        client = sent(port, post(Content_Length=1), b"x")
        client.close()
        assert ended.wait(PATIENCE_S / 2)


@pytest.mark.parametrize(("behind", "later"), [(0, False), (1, False), (1, True), (3, True)])
def test_a_client_that_leaves_is_noticed_whatever_it_sent_behind_its_request(behind: int, later: bool) -> None:
    came, left = threading.Event(), threading.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        came.set()
        assert (await receive())["type"] == "http.disconnect"
        left.set()

    with serving(app, 600.0) as port:
        request = post(Content_Length=1) + b"x"
        client = sent(port, request * (1 if later else 1 + behind))
        assert came.wait(PATIENCE_S)
        if later:
            client.sendall(request * behind)
            time.sleep(0.3)  # the server has read it
        client.close()
        assert left.wait(PATIENCE_S)


def test_requests_behind_each_other_are_answered_in_their_order() -> None:
    app = Application()
    app.think_s = 0.05
    with serving(app, 600.0) as port:
        sizes = range(1, 2 * timed_protocol.MOST_BEHIND + 5)
        with sent(port, b"".join(post(Content_Length=size) + b"x" * size for size in sizes)) as client:
            whole = b""
            while whole.count(b"HTTP/1.1 200") < len(sizes) or not whole.endswith(str(sizes[-1]).encode()):
                whole += piece if (piece := client.recv(1 << 16)) else pytest.fail(f"cut: {whole!r}")
    told = [int(part.partition(b"\r\n\r\n")[2]) for part in whole.split(b"HTTP/1.1 200")[1:]]
    assert told == list(sizes)


def test_work_whose_client_stays_says_what_it_found() -> None:
    async def stays() -> Message:
        await asyncio.sleep(PATIENCE_S)
        raise AssertionError

    async def fails() -> int:
        raise ValueError("no")

    async def works() -> int:
        return 3

    async def ask() -> None:
        assert await while_there(stays, works()) == 3
        with pytest.raises(ValueError, match="no"):
            await while_there(stays, fails())

    asyncio.run(ask())


def test_bounds_and_the_time_for_a_head_are_as_the_environment_says() -> None:
    bounds = Bounds.of(settings.load({"POMARIUM_MAX_BODY": "1KiB", "POMARIUM_CLIENT_TIMEOUT": "7"}))
    assert bounds == Bounds(1024, (200 << 20) + door.FORM_BYTES, 7.0)
    with socket.socket() as listener:
        server = HttpServer(Application(), listener, bounds, lambda method, path, status: None)
    protocol = server._server.config.http
    assert isinstance(protocol, type)
    assert issubclass(protocol, TimedProtocol)
    assert protocol.head_timeout == 7.0


@pytest.mark.parametrize("value", ["", "0", "-1", "8MB", "1.5MiB", "many"])
def test_a_bound_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(SettingsError, match="POMARIUM_MAX_BODY"):
        settings.load({"POMARIUM_MAX_BODY": value})
    with pytest.raises(SettingsError, match="POMARIUM_CLIENT_TIMEOUT"):
        settings.load({"POMARIUM_CLIENT_TIMEOUT": value.replace("8MB", "x").replace("1.5MiB", "inf")})
