"""What strangers can do to an endpoint: other users of its machine, and clients that send too much or too slowly.

One server with a tiny model, a key, and bounds that are soon reached (guarded.py).
"""

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from guarded import AUTHORISED, BODY_BYTES, HF_TOKEN, KEY, TIMEOUT_S, UPLOAD_BYTES, Guarded
from serve_process import CONTEXT, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

NOBODY = 65534
PATIENCE_S = 60.0


@pytest.fixture
def server(guarded_server: Guarded) -> Guarded:
    return guarded_server


# --- other users of the machine -------------------------------------------------------------------------------------


def look_around(wanted: list[str], answer: "multiprocessing.SimpleQueue[dict[str, list[str]]]") -> None:
    """What a user without rights finds: files and process tables with a secret in them, sockets that let him in."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    found: dict[str, list[str]] = {"secrets": [], "sockets": [], "read": []}
    tables = [path for name in ("cmdline", "environ") for path in Path("/proc").glob(f"[0-9]*/{name}")]
    files = (Path(folder) / name for top in ("/tmp", "/dev/shm") for folder, _, names in os.walk(top) for name in names)
    for path in (*tables, *files):
        try:
            if path.is_socket():
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(path))
                found["sockets"].append(str(path))
            elif path.is_file() and path.stat().st_size < 50 << 20:
                content = path.read_bytes()
                found["read"].append(str(path))
                if any(secret.encode() in content for secret in wanted):
                    found["secrets"].append(str(path))
        except OSError:
            continue
    answer.put(found)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_finds_no_secret_and_no_way_in(server: Guarded) -> None:
    environs = [process.environ() for process in server.processes()]
    assert any(environ.get("POMARIUM_API_KEY") == KEY for environ in environs), "the look would find nothing anyhow"
    tokens = {environ["RAY_AUTH_TOKEN"] for environ in environs if "RAY_AUTH_TOKEN" in environ}
    context = multiprocessing.get_context("fork")
    answer: multiprocessing.SimpleQueue[dict[str, list[str]]] = context.SimpleQueue()
    child = context.Process(target=look_around, args=([KEY, HF_TOKEN, *tokens], answer))
    child.start()
    found = answer.get()
    child.join()
    assert len(tokens) == 1
    assert any(path.endswith("cmdline") for path in found["read"])
    assert found["secrets"] == []
    own = {str(Path(name)) for name in server_sockets(server)}
    assert own, "Ray has sockets"
    assert own.isdisjoint(found["sockets"])
    assert set() == server.shown


def server_sockets(server: Server) -> set[str]:
    """Paths of the Unix sockets that the server's processes listen on."""
    return {
        connection.laddr
        for process in server.processes()
        for connection in process.net_connections("unix")
        if isinstance(connection.laddr, str) and connection.laddr.startswith("/")
    }


# --- clients --------------------------------------------------------------------------------------------------------


def connect(server: Server, sent: bytes = b"") -> socket.socket:
    client = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S)
    client.sendall(sent)
    return client


def received(client: socket.socket) -> bytes:
    """All until the server closes the connection. Raises TimeoutError if it does not."""
    pieces = []
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    return b"".join(pieces)


def one_answer(client: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of the answer that comes next, in however many pieces; the connection may stay open."""
    taken = b""
    while b"\r\n\r\n" not in taken:
        taken += _some(client)
    head, _, body = taken.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    while len(body) < length:
        body += _some(client)
    return head, body


def _some(client: socket.socket) -> bytes:
    piece = client.recv(1 << 16)
    assert piece, "the connection ended before the answer did"
    return piece


def post(path: str, headers: str) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{headers}\r\n".encode("latin-1")


def models(server: Server, path: str = "/v1/models", **headers: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers=AUTHORISED | headers, timeout=PATIENCE_S)


@pytest.mark.parametrize("path", ["/-/routes", "/-/healthz", "/-/anything"])
def test_paths_of_serve_s_own_are_not_there(server: Server, path: str) -> None:
    answer = httpx.get(server.url + path, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")


def test_heads_that_do_not_end_are_closed_while_others_are_answered(server: Server) -> None:
    began = time.monotonic()
    half = [connect(server, b"POST /v1/completions HTTP/1.1\r\nHost:") for _ in range(30)]
    silent = [connect(server) for _ in range(5)]
    again = connect(server, post("/v1/nothing", "Content-Length: 0\r\n"))
    assert one_answer(again)[0].startswith(b"HTTP/1.1 404")
    again.sendall(b"GET /v1/mod")
    assert models(server).status_code == 200
    answers = [received(client) for client in (*half, again)]
    assert all(answer.startswith(b"HTTP/1.1 408") for answer in answers), answers
    assert [received(client) for client in silent] == [b""] * 5
    assert time.monotonic() - began >= TIMEOUT_S


def test_a_head_without_end_is_cut(server: Server) -> None:
    client = connect(server, b"GET / HTTP/1.1\r\n")
    with contextlib.suppress(ConnectionError):
        for index in range(200):
            client.sendall(f"X-{index}: {'x' * 1000}\r\n".encode())
    with contextlib.suppress(ConnectionError):
        answer = received(client)  # nothing, where the connection's end overtook it
        assert not answer or answer.startswith(b"HTTP/1.1 431"), answer
    assert models(server).status_code == 200


def test_a_body_of_a_byte_a_second_is_a_408_that_ends_the_connection(server: Server) -> None:
    clients = [connect(server, post("/v1/completions", "Content-Length: 1000\r\n")) for _ in range(10)]
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() - began < TIMEOUT_S * 2:
            for client in clients:
                client.sendall(b" ")
            time.sleep(0.5)
    for client in clients:
        answer = received(client)
        assert not answer or answer.startswith(b"HTTP/1.1 408"), answer
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize(
    ("path", "most"), [("/v1/completions", BODY_BYTES), ("/tokenize", BODY_BYTES), ("/v1/files", UPLOAD_BYTES + 65536)]
)
def test_a_body_that_is_announced_as_too_large_is_refused_before_it_comes(server: Server, path: str, most: int) -> None:
    client = connect(server, post(path, f"Content-Length: {most + 1}\r\n"))
    head, body = one_answer(client)
    assert head.startswith(b"HTTP/1.1 413"), head
    assert str(most) in json.loads(body)["error"]["message"]


def test_a_body_that_turns_out_too_large_is_refused_and_whoever_sends_it_reads_so(server: Server) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(BODY_BYTES // (1 << 16) + 10):
            yield b" " * (1 << 16)

    with httpx.Client(headers=AUTHORISED, timeout=PATIENCE_S) as client:
        chunked = client.post(f"{server.url}/v1/completions", content=pieces())
        announced = client.post(f"{server.url}/v1/completions", content=b" " * (BODY_BYTES + 1))
        upload = client.post(f"{server.url}/v1/files", files={"file": b"x" * (2 << 20)}, data={"purpose": "batch"})
        allowed = client.post(f"{server.url}/v1/completions", content=b" " * BODY_BYTES)
    assert [answer.status_code for answer in (chunked, announced, upload, allowed)] == [413, 413, 413, 400]


def test_an_error_repeats_little_of_what_was_sent(server: Server) -> None:
    for name in ("x" * (1 << 20), ["y" * (1 << 20)]):
        answer = httpx.post(
            f"{server.url}/v1/completions", headers=AUTHORISED, json={"model": name}, timeout=PATIENCE_S
        )
        assert (answer.status_code, len(answer.content) < 500) == (404, True)
    assert len(models(server, "/v1/" + "z" * 30_000).content) < 500


@pytest.mark.parametrize("given", [b"caf\xe9", b"caf\xc3\xa9", b"\xff\xfe", b"x" * 5000])
@pytest.mark.parametrize("name", [b"X-Request-Id", b"X-Session-Id", b"serve_multiplexed_model_id", b"User-Agent"])
def test_a_header_that_is_no_text_harms_nobody(server: Server, name: bytes, given: bytes) -> None:
    client = connect(server)
    client.sendall(
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer "
        + KEY.encode() + b"\r\n" + name + b": " + given + b"\r\n\r\n"
    )  # fmt: skip
    answer = received(client)
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    assert given not in answer


def test_a_request_id_comes_back(server: Server) -> None:
    assert models(server, **{"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_models_have_the_fields_that_vllm_s_clients_read(server: Server) -> None:
    (card,) = models(server).json()["data"]
    assert (card["id"], card["object"], card["parent"]) == ("tiny", "model", None)
    assert (Path(card["root"]) / "config.json").is_file()
    assert card["max_model_len"] == CONTEXT
    assert card["permission"][0]["object"] == "model_permission"
    assert models(server, "/v1/models/").json()["data"] == [card]
    assert models(server, "/v1/models/tiny").json() == card


def test_no_origin_but_the_endpoint_s_own_is_admitted(server: Server) -> None:
    origin = {"Origin": "https://elsewhere.example"}
    answers = [
        models(server, **origin),
        httpx.options(
            f"{server.url}/v1/chat/completions", headers=origin | {"Access-Control-Request-Method": "POST"}, timeout=60
        ),
    ]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def resident(server: Server) -> dict[str, int]:
    """Bytes of its own of each process that bodies pass through: they share Ray's object store, of constant size."""
    found = {}
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            line = " ".join(process.cmdline())
            for word in ("ServeReplica:pomarium:ingress", "ServeReplica:pomarium:engine"):
                if word in line:
                    found[f"{word} {process.pid}"] = process.memory_full_info().uss
    return found


def test_large_bodies_leave_nothing_behind(server: Server) -> None:
    size = BODY_BYTES // 2

    def send(count: int) -> None:
        with httpx.Client(headers=AUTHORISED, timeout=PATIENCE_S) as client:
            for _ in range(count):
                refused = {"model": "tiny", "prompt": secrets.token_hex(size // 2), "max_tokens": 1}
                assert client.post(f"{server.url}/v1/completions", json=refused).status_code == 400

    send(2)
    before = resident(server)
    assert len(before) == 2
    send(20)
    after = resident(server)
    grown = {name: (after[name] - held) / size for name, held in before.items()}
    assert max(grown.values()) < 10, f"bodies that each process still has: {grown}"
