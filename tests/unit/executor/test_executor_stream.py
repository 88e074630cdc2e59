"""Control of a worker by an engine, over a real stream and wire on loopback, without Ray and vLLM."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from recording_proxy import proxied

from pomarium.cluster.executor import wire
from pomarium.cluster.executor.codec import (
    Method,
    WorkerError,
    WorkerLostError,
    decode,
    describe,
    encode,
    encode_call,
    method_name,
)
from pomarium.cluster.executor.link import Reply, WorkerLink
from pomarium.cluster.executor.service import ControlService, serve
from pomarium.cluster.executor.wire import Wire
from pomarium.cluster.http.sealing import KEY_BYTES, End
from pomarium.proto import control_pb2 as pb
from pomarium.worker.errors import CheckpointError
from pomarium.worker.settings import STEP_TIMEOUT, step_timeout

TOKEN = "a token"
WAIT_S = 10.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Peer:
    """A worker's process in miniature: executes calls on `methods` on a thread of its own, records their order."""

    def __init__(self, methods: dict[str, Callable[..., Any]]) -> None:
        self.ended = threading.Event()
        self.executed: list[str] = []
        self._methods = methods
        self.service = ControlService(TOKEN, self.ended.set)
        self.server, self.address = serve(self.service, "127.0.0.1")
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self.service.calls.get()
            self.executed.append(call.method)
            method, args, kwargs = decode(call.payload)
            try:
                value = self._methods[method](*args, **kwargs) if isinstance(method, str) else method(self, *args)
            except Exception as error:  # noqa: BLE001 - as the worker's host does
                self.service.report(pb.Report(failure=describe(call.seq, call.method, error)))
                continue
            if call.wants_result:
                self.service.report(pb.Report(result=pb.Result(seq=call.seq, payload=encode(value))))


class Failures:
    def __init__(self) -> None:
        self.first: Future[Exception] = Future()
        self.count = 0

    def __call__(self, error: Exception) -> None:
        self.count += 1
        self.first.set_result(error)


def _raise_checkpoint_error() -> None:
    raise CheckpointError("config.json is missing: choose another folder.")


def _raise_value_error() -> None:
    raise ValueError("broken")


METHODS: dict[str, Callable[..., Any]] = {
    "echo": lambda value: value,
    "user_fault": _raise_checkpoint_error,
    "our_fault": _raise_value_error,
}


@pytest.fixture
def gate() -> threading.Event:
    """The peer's method "gate" returns when it is set."""
    return threading.Event()


@pytest.fixture
def peer(gate: threading.Event) -> Iterator[Peer]:
    release = threading.Event()
    made = Peer({**METHODS, "hang": release.wait, "gate": gate.wait})
    yield made
    gate.set()
    release.set()
    made.server.stop(0)


@pytest.fixture
def failures() -> Failures:
    return Failures()


@pytest.fixture
def link(peer: Peer, failures: Failures) -> Iterator[WorkerLink]:
    made = WorkerLink("worker 0", peer.address, TOKEN, failures)
    made.wait_ready(WAIT_S)
    yield made
    made.close()


def call(link: WorkerLink, method: Method, *args: Any, fatal: bool = False, timeout_s: float = WAIT_S) -> Reply:
    return link.call(method_name(method), encode_call(method, args), timeout_s, fatal)


def test_a_step_ends_when_it_ends() -> None:
    """A worker that computes is not lost: without a time of the user's own there is none, and with one it counts."""
    assert step_timeout({}) is None
    assert step_timeout({STEP_TIMEOUT: "7"}) == 7.0
    endless, bound = Reply("worker 0: sample_tokens", None), Reply("worker 0: sample_tokens", 0.05)
    late = endless.then(len)
    threading.Timer(0.3, endless.set_result, ["abc"]).start()
    with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s"):
        bound.result()
    assert late.result() == 3


def test_a_changed_reply_fails_as_the_one_before(link: WorkerLink) -> None:
    reply = call(link, "our_fault").then(len)
    with pytest.raises(WorkerError, match="broken"):
        reply.result()


def test_results_come_back_to_their_calls_in_order(link: WorkerLink, peer: Peer) -> None:
    replies = []
    for index in range(100):
        if index % 3 == 0:
            link.post("echo", encode_call("echo", (index,)))
        replies.append(call(link, "echo", index))
    assert [reply.result() for reply in replies] == list(range(100))
    assert len(peer.executed) == 134


def test_no_proxy_of_the_environment_comes_between(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch) as proxy:
        link = WorkerLink("worker 0", peer.address, TOKEN, Failures())
        try:
            link.wait_ready(WAIT_S)
            assert call(link, "echo", 5).result() == 5
        finally:
            link.close()
    assert proxy.asked == []


def test_a_callable_travels_by_value(link: WorkerLink) -> None:
    secret = object.__name__
    assert call(link, lambda worker, n: (type(worker).__name__, secret, n), 3).result() == ("Peer", "object", 3)


def test_large_payloads_pass(link: WorkerLink) -> None:
    value = bytes(16 << 20)
    assert call(link, "echo", value).result() == value


def test_a_users_fault_keeps_its_class_and_sentence(link: WorkerLink, failures: Failures) -> None:
    with pytest.raises(CheckpointError, match=r"^config\.json is missing: choose another folder\.$"):
        call(link, "user_fault").result()
    assert call(link, "echo", 1).result() == 1
    assert failures.count == 0


def test_our_fault_carries_the_workers_traceback_and_the_link_lives_on(link: WorkerLink, failures: Failures) -> None:
    with pytest.raises(WorkerError, match=r"(?s)worker 0: our_fault raised ValueError: broken.*_raise_value_error"):
        call(link, "our_fault").result()
    assert call(link, "echo", 1).result() == 1
    assert failures.count == 0


@pytest.mark.parametrize("how", ["posted", "fatal"])
def test_a_step_that_raises_fails_everything_that_waits(
    link: WorkerLink, failures: Failures, gate: threading.Event, how: str
) -> None:
    link.post("gate", encode_call("gate"))
    if how == "posted":
        link.post("our_fault", encode_call("our_fault"))
        waiting = [call(link, "hang")]
    else:
        waiting = [call(link, "our_fault", fatal=True), call(link, "hang")]
    gate.set()
    error = failures.first.result(WAIT_S)
    assert "ValueError: broken" in str(error)
    for reply in waiting:
        assert reply.exception(WAIT_S) is error
    with pytest.raises(WorkerError):
        call(link, "echo", 1)
    assert failures.count == 1


def test_the_loss_of_the_peer_fails_everything_that_waits(link: WorkerLink, peer: Peer, failures: Failures) -> None:
    waiting = call(link, "hang")
    peer.server.stop(0)
    with pytest.raises(WorkerLostError, match="worker 0 was lost"):
        waiting.result()
    assert isinstance(failures.first.result(WAIT_S), WorkerLostError)


def test_pending_replies_fail_before_the_callback_runs(peer: Peer) -> None:
    seen: Future[bool] = Future()
    link = WorkerLink("worker 0", peer.address, TOKEN, lambda _: seen.set_result(waiting.done()))
    link.wait_ready(WAIT_S)
    waiting = call(link, "hang")
    peer.server.stop(0)
    assert seen.result(WAIT_S)
    link.close()


def test_a_reply_is_not_awaited_for_ever(link: WorkerLink) -> None:
    with pytest.raises(TimeoutError, match=r"worker 0: hang did not end within 0\.05 s"):
        call(link, "hang", timeout_s=0.05).result()


def test_closing_ends_the_peer_and_is_no_failure(peer: Peer, failures: Failures) -> None:
    link = WorkerLink("worker 0", peer.address, TOKEN, failures)
    link.wait_ready(WAIT_S)
    waiting = call(link, "hang")
    link.close()
    assert peer.ended.wait(WAIT_S)
    assert isinstance(waiting.exception(WAIT_S), WorkerLostError)
    assert failures.count == 0
    with pytest.raises(WorkerLostError, match="shut down"):
        call(link, "echo", 1)


@pytest.mark.parametrize("token", ["", "a toke", "a token ", "A TOKEN"])
def test_another_token_is_refused_before_any_call_is_read(peer: Peer, failures: Failures, token: str) -> None:
    link = WorkerLink("worker 0", peer.address, token, failures)
    with pytest.raises(WorkerLostError, match="UNAUTHENTICATED"):
        link.wait_ready(WAIT_S)
    with pytest.raises(WorkerLostError, match="UNAUTHENTICATED"):
        link.post("echo", encode_call("echo", (1,)))
    link.close()
    assert peer.executed == []
    assert not peer.ended.is_set(), "a stranger must not be able to end the worker"


def test_a_second_engine_is_refused_and_the_first_goes_on(link: WorkerLink, peer: Peer) -> None:
    second = WorkerLink("worker 0", peer.address, TOKEN, Failures())
    with pytest.raises(WorkerLostError, match="FAILED_PRECONDITION"):
        second.wait_ready(WAIT_S)
    second.close()
    assert call(link, "echo", 1).result() == 1
    assert not peer.ended.is_set()


def test_nobody_listens(failures: Failures) -> None:
    with socket.socket() as free:  # a port that was free a moment ago
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    link = WorkerLink("worker 0", f"127.0.0.1:{port}", TOKEN, failures)
    with pytest.raises(WorkerLostError, match="UNAVAILABLE"):
        link.wait_ready(WAIT_S)
    link.close()


def test_the_service_listens_on_its_host_only(peer: Peer) -> None:
    host, port = peer.address.rsplit(":", 1)
    assert host == "127.0.0.1"
    assert set(listeners(int(port))) == {host}


def test_a_process_that_served_a_stream_can_exit(tmp_path: Path) -> None:
    """Nothing waits for reports once the engine is gone: Python joins the pool's threads when it exits."""
    script = tmp_path / "serve.py"
    script.write_text(
        "from pomarium.cluster.executor.link import WorkerLink\n"
        "from pomarium.cluster.executor.service import ControlService, serve\n"
        "import threading\n"
        "ended = threading.Event()\n"
        "service = ControlService('token', on_end=ended.set)\n"
        "server, address = serve(service, '127.0.0.1')\n"
        "link = WorkerLink('worker 0', address, 'token', lambda error: None)\n"
        f"link.wait_ready({WAIT_S})\n"
        "link.close()\n"
        "assert ended.wait(10)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=30)


def listeners(port: int) -> list[str]:
    """Addresses on which this process listens at `port`."""
    return [
        one.laddr.ip.removeprefix("::ffff:")
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN and one.laddr.port == port
    ]


def test_the_wire_is_offered_on_the_same_host_until_the_engine_has_it(peer: Peer) -> None:
    before = {
        one.laddr.port: one.laddr.ip
        for one in psutil.Process().net_connections("tcp")
        if one.status == psutil.CONN_LISTEN
    }
    link = WorkerLink("worker 0", peer.address, TOKEN, Failures())
    port = link.wait_ready(WAIT_S).port
    assert before[port] == "127.0.0.1"
    until(lambda: not listeners(port))
    assert call(link, "echo", 1).result() == 1
    link.close()


def test_the_loss_of_the_wire_alone_is_the_loss_of_the_peer(link: WorkerLink, peer: Peer, failures: Failures) -> None:
    waiting = call(link, "hang")
    peer.service._wire.result().cut()
    with pytest.raises(WorkerLostError, match="worker 0 was lost: it closed the connection"):
        waiting.result()
    assert isinstance(failures.first.result(WAIT_S), WorkerLostError)
    link.close()
    assert peer.ended.wait(WAIT_S)


def test_who_sends_to_a_worker_that_takes_nothing_is_released_by_its_loss(
    link: WorkerLink, failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As to a frozen one, whose pings end the stream."""
    near, far = socket.socketpair()
    monkeypatch.setattr(link, "_wire", Wire(near, bytes(KEY_BYTES), End.DIALLED))
    sent: Future[Reply] = Future()

    def send() -> None:
        try:
            sent.set_result(call(link, "echo", bytes(16 << 20)))
        except WorkerLostError as error:
            sent.set_exception(error)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(TimeoutError):
        sent.result(0.3)
    link.fail(WorkerLostError("worker 0 was lost: it is frozen"))
    with pytest.raises(WorkerLostError, match="it is frozen"):
        sent.result(WAIT_S)
    assert failures.count == 1
    far.close()


def test_a_failure_before_the_engine_came_is_told_when_it_comes() -> None:
    ended = threading.Event()
    service = ControlService(TOKEN, ended.set)
    server, address = serve(service, "127.0.0.1")
    report = pb.Report(failure=describe(0, "starting", ImportError("no vllm")))
    threading.Thread(target=service.report, args=(report,), daemon=True).start()
    failures = Failures()
    link = WorkerLink("worker 0", address, TOKEN, failures)
    link.wait_ready(WAIT_S)
    assert "ImportError: no vllm" in str(failures.first.result(WAIT_S))
    link.close()
    server.stop(0)


def test_an_answer_too_large_to_send_is_the_loss_of_the_peer(
    link: WorkerLink, failures: Failures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for what cannot come."""
    waiting = call(link, lambda worker: bytes(2000))
    assert len(waiting.result()) == 2000
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 1500)
    waiting = call(link, lambda worker: bytes(2000))
    with pytest.raises(WorkerLostError, match="worker 0 was lost: it closed the connection"):
        waiting.result()
    assert isinstance(failures.first.result(WAIT_S), WorkerLostError)
    assert failures.count == 1


def test_large_answers_and_large_calls_pass_each_other(link: WorkerLink) -> None:
    """Both ends write more than a connection holds before either reads its answer."""
    value = bytes(24 << 20)
    replies = [call(link, "echo", value) for _ in range(4)]
    assert all(reply.result() == value for reply in replies)
