"""What does not answer ssh is told from what does, in words that say what to do, and is waited for up to a deadline."""

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ssh_hosts import ADDRESS, LIMIT_S, PART_S, SHORT_S, configure, nobody, running, stand_in

from pomarium.cluster.autoscaling import ssh
from pomarium.cluster.autoscaling.ssh import NoAnswerError, SshError, SshHost, answers, await_ssh, run, run_and_part

pytestmark = pytest.mark.e2e


@contextmanager
def listener(serve: Callable[[socket.socket], object] | None = None) -> Iterator[SshHost]:
    """Takes connections, and does that with each, then closes it; nothing at all, and leaves it open, without."""
    with socket.create_server((ADDRESS, 0)) as made:
        if serve is not None:
            threading.Thread(target=_serve, args=(made, serve), daemon=True).start()
        try:
            yield SshHost("rack", ADDRESS, made.getsockname()[1], ("UserKnownHostsFile=/dev/null",))
        finally:
            made.shutdown(socket.SHUT_RDWR)


def _serve(made: socket.socket, serve: Callable[[socket.socket], object]) -> None:
    while True:
        try:
            connection, _ = made.accept()
        except OSError:
            return  # shut down
        with connection, contextlib.suppress(OSError):  # the other has seen enough
            serve(connection)


def say(*pieces: bytes) -> Callable[[socket.socket], object]:
    def serve(connection: socket.socket) -> None:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.05)

    return serve


@pytest.mark.parametrize("give", [run, run_and_part])
def test_nothing_listens(give: Callable[..., object]) -> None:
    absent = nobody()
    assert not answers(absent, SHORT_S)
    with pytest.raises(NoAnswerError) as caught:
        give(absent, ("true",), PART_S)
    assert str(caught.value) == (
        f"rack@{ADDRESS} port {absent.port} does not answer ssh (ssh: connect to host {ADDRESS} port {absent.port}: "
        "Connection refused): look whether it is awake, and whether Remote Login is on in its Sharing settings."
    )


def test_a_listener_that_says_nothing() -> None:
    with listener() as silent:
        began = time.monotonic()
        assert not answers(silent, 0.2)
        with pytest.raises(NoAnswerError, match="does not answer ssh"):
            run(silent, ("true",), SHORT_S)
        assert time.monotonic() - began < SHORT_S + 2


@pytest.mark.parametrize("give", [run, run_and_part])
def test_a_connection_that_is_closed_before_the_command_was_given(give: Callable[..., object]) -> None:
    with listener(say()) as closing, pytest.raises(NoAnswerError, match=r"Connection (closed|reset) by"):
        give(closing, ("true",), PART_S)


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ((b"SSH-2.0-x\r\n",), True),
        ((b"S", b"SH-2.0", b"-x\n"), True),
        ((b"This rack is ours.\r\nSSH", b"-2.0-x\r\n"), True),
        ((b"SSH-2.0-x",), False),
        ((b"HTTP/1.1 400 Bad Request\r\nX: SSH-2.0\r\n",), False),
        ((b"x" * (ssh.MAX_GREETING + 1), b"\nSSH-2.0-x\r\n"), False),
    ],
)
def test_only_a_whole_version_line_is_an_answer(pieces: tuple[bytes, ...], expected: bool) -> None:
    with listener(say(*pieces)) as found:
        assert answers(found, SHORT_S) is expected


def test_a_name_that_nobody_knows_does_not_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names are not looked up here: ssh's words are given to it, and the look-up fails."""

    def fail(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    stand_in(monkeypatch, tmp_path, "echo 'ssh: Could not resolve hostname mini-9: Unknown name' >&2; exit 255")
    assert not answers(SshHost("rack", "mini-9"), SHORT_S)
    with pytest.raises(NoAnswerError, match=r"rack@mini-9 does not answer ssh \(.*hostname mini-9: Unknown name\)"):
        run(SshHost("rack", "mini-9"), ("true",), LIMIT_S)


def test_there_is_no_ssh_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SshError, match=r"^There is no ssh client here: install OpenSSH's"):
        run(nobody(), ("true",), LIMIT_S)


# --- waiting --------------------------------------------------------------------------------------------------------


def test_a_server_that_starts_later_is_awaited(tmp_path: Path) -> None:
    later = configure(tmp_path)
    with running(("sh", "-c", f"sleep 1; exec {shlex.join(later.command)}"), tmp_path / "log"):
        began = time.monotonic()
        await_ssh(later.host, LIMIT_S, 0.1)
        assert time.monotonic() - began > 0.9
        assert run(later.host, ("echo", "up"), LIMIT_S) == "up\n"


def test_waiting_ends_at_the_deadline() -> None:
    now, pauses = [100.0], []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        now[0] += seconds

    with pytest.raises(NoAnswerError, match=r"does not answer ssh \(not within 5 s\)"):
        await_ssh(nobody(), 5.0, 2.0, sleep, lambda: now[0])
    assert pauses == [2.0, 2.0, 1.0]
