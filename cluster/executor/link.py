"""The engine's end of control of one worker: a stream of gRPC's for identity and life, a wire for calls.

    call()/post() ==Call==> worker ==Report==> reader thread --> Future of the call
                            worker --Ready---> life thread: dials the wire
                                       |
                                       +--> failure: every pending Future, then `on_failure`

Calls are written on the thread that makes them. A link fails once and for good: the stream or the wire breaks, a fatal
call raises, or a call overruns its time. Each end shows the other a certificate of the rack (mutual TLS); without
certificates a link stays on loopback.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Any

import grpc

from pomarium.cluster.executor.channel import CLIENT_OPTIONS, explain, is_cut
from pomarium.cluster.executor.codec import WorkerLostError, decode, rebuild
from pomarium.cluster.executor.entrance import dial
from pomarium.cluster.executor.service import AUTHORIZATION, bearer
from pomarium.cluster.executor.wire import Wire
from pomarium.proto import control_pb2 as pb
from pomarium.proto import control_pb2_grpc as pb_grpc
from pomarium.worker import local_network
from pomarium.worker.address import host_of
from pomarium.worker.handoff.credentials import Tls, check_private, open_channel
from pomarium.worker.handoff.errors import CredentialsError

DIAL_TIMEOUT_S = 5.0
"""The worker's stream has just answered from the same address."""


class Reply(Future[Any]):
    """The result of a call. `result()` waits no longer than the call was given, whatever the caller asks for."""

    def __init__(self, what: str, timeout_s: float | None) -> None:
        super().__init__()
        self._what, self._timeout_s = what, timeout_s

    def result(self, timeout: float | None = None) -> Any:
        """As Future.result; raises TimeoutError when `timeout` or, failing that, the call's own time is over."""
        limit = self._timeout_s if timeout is None else timeout
        try:
            return super().result(limit)
        except TimeoutError:
            if self.done():
                raise
            raise TimeoutError(f"{self._what} did not end within {limit:g} s") from None

    def then(self, change: Callable[[Any], Any]) -> "Reply":
        """A reply whose result is what `change` makes of this one's, on the thread that brings it."""
        changed = Reply(self._what, self._timeout_s)

        def on_done(reply: Future[Any]) -> None:
            if (error := reply.exception()) is not None:
                changed.set_exception(error)
            else:
                changed.set_result(change(reply.result()))

        self.add_done_callback(on_done)
        return changed


def gather(replies: Sequence[Reply]) -> Future[list[Any]]:
    """A Future of all results in order, or of the first exception."""
    future: Future[list[Any]] = Future()
    lock = threading.Lock()
    left = len(replies)

    def on_done(reply: Future[Any]) -> None:
        nonlocal left
        with lock:
            left -= 1
            error = reply.exception()
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif left == 0:
                future.set_result([r.result() for r in replies])

    for reply in replies:
        reply.add_done_callback(on_done)
    return future


@dataclass(frozen=True)
class _Pending:
    reply: Reply
    fatal: bool


class WorkerLink:
    """Calls to one worker.

    Attributes:
        name: the worker, for messages.
    """

    def __init__(
        self,
        name: str,
        address: str,
        token: str,
        on_failure: Callable[[Exception], None],
        tls: Tls | None = None,
        allow_plaintext: bool = False,
    ) -> None:
        """Connects; `wait_ready` says how it went, and comes before the first call.

        Args:
            address: HOST:PORT of the worker's service.
            on_failure: called at most once, on another thread, after all pending replies have failed.
            tls: this machine's identity; the worker has to show one of the same rack. Without it, `address` must be on
                loopback.
            allow_plaintext: unless nobody else can reach the network, as the user says.

        Raises PlaintextRefusedError.
        """
        check_private(address, tls, allow_plaintext)
        self.name, self._address = name, address
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._seq = itertools.count()
        self._pending: dict[int, _Pending] = {}
        self._failure: Exception | None = None
        self._closing = False
        self._wire: Wire | None = None
        self._ready = Reply(f"{name}: connecting to {address}", 0.0)
        self._channel = open_channel(address, tls, CLIENT_OPTIONS)
        stub = pb_grpc.WorkerStub(self._channel)  # type: ignore[no-untyped-call]
        metadata = ((AUTHORIZATION, bearer(token)),)
        self._stream = stub.Attend(pb.Engine(), metadata=metadata)
        self._life = threading.Thread(target=self._attend, name=f"{name}-life", daemon=True)
        self._life.start()

    def wait_ready(self, timeout_s: float) -> pb.Ready:
        """What the worker says of itself. Raises WorkerLostError, TimeoutError, or CredentialsError: another rack's."""
        ready: pb.Ready = self._ready.result(timeout_s)
        return ready

    def call(self, method: str, payload: bytes, timeout_s: float | None, fatal: bool = False) -> Reply:
        """Send a call and return its reply; waits while the worker's machine takes nothing, which pings bound.

        Args:
            payload: of `encode_call`.
            timeout_s: None: as long as the worker is not lost.
            fatal: the worker cannot go on if this raises: the link fails with it.

        Raises what the link failed with, if it has.
        """
        reply = Reply(f"{self.name}: {method}", timeout_s)
        self._send(method, payload, _Pending(reply, fatal))
        return reply

    def post(self, method: str, payload: bytes) -> None:
        """Send a call that has no result of its own. If it raises, the link fails."""
        self._send(method, payload, None)

    def fail(self, error: Exception) -> None:
        """Fail the link and every pending reply with `error`; only the first time counts."""
        with self._lock:
            if self._failure is not None or self._closing:
                return
            self._failure = error
            pending, self._pending = self._pending, {}
        for waiting in (*(p.reply for p in pending.values()), self._ready):
            if not waiting.done():
                waiting.set_exception(error)
        if self._wire is not None:
            self._wire.cut()  # who sends must not wait for a worker that is frozen
        self._on_failure(error)

    def close(self) -> None:
        """End the stream, which the worker takes as the end of the engine. Pending replies fail; the link does not."""
        with self._lock:
            self._closing = True
            pending, self._pending = self._pending, {}
        for waiting in (p.reply for p in pending.values()):
            waiting.set_exception(WorkerLostError(f"{self.name} was shut down"))
        if self._wire is not None:
            self._wire.cut()
        self._stream.cancel()
        self._channel.close()
        if threading.current_thread() is not self._life:
            self._life.join(timeout=5)

    def _send(self, method: str, payload: bytes, pending: _Pending | None) -> None:
        with self._lock:
            self._check_open()
            seq = next(self._seq)
            if pending is not None:
                self._pending[seq] = pending
        assert self._wire is not None, "wait_ready comes first"
        call = pb.Call(seq=seq, method=method, wants_result=pending is not None, payload=payload)
        try:
            self._wire.send(call.SerializeToString())
        except OSError as error:
            self.fail(self._gone(error))
            self._check_open()

    def _check_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise WorkerLostError(f"{self.name} was shut down")

    def _attend(self) -> None:
        try:
            for ready in self._stream:
                self._open(ready)
            lost: Exception = WorkerLostError(f"{self.name} was lost: it ended the stream")
        except grpc.RpcError as error:
            lost = self._loss(error.code().name, error.details())
        except OSError as error:
            lost = self._gone(error)
        self.fail(lost)

    def _open(self, ready: pb.Ready) -> None:
        wire = dial(host_of(self._address), ready.port, ready.key, DIAL_TIMEOUT_S)
        with self._lock:
            self._wire = wire
            if self._failure is not None or self._closing:
                wire.close()
                return
        with contextlib.suppress(InvalidStateError):  # another link's failure became this one's meanwhile
            self._ready.set_result(ready)
        threading.Thread(target=self._read, args=(wire,), name=f"{self.name}-reports", daemon=True).start()

    def _read(self, wire: Wire) -> None:
        with contextlib.closing(wire):
            try:
                while True:
                    self._on_report(pb.Report.FromString(wire.receive()))
            except OSError as error:
                self.fail(self._gone(error))

    def _gone(self, error: OSError) -> WorkerLostError:
        reason = local_network.reason(error)
        return WorkerLostError(f"{self.name} was lost: {local_network.explained(reason, self._address)}")

    def _loss(self, code: str, details: str) -> Exception:
        if not self._ready.done():
            if fault := explain(details):
                return CredentialsError(f"{self.name} cannot be trusted: {fault}.")
            if is_cut(details):
                return WorkerLostError(
                    f"{self.name} closed the connection before it answered: it is gone, or its machine joined a rack "
                    f"(POMARIUM_TLS) and this one did not join the same ({code}: {details})"
                )
        return WorkerLostError(f"{self.name} was lost: {local_network.explained(f'{code}: {details}', self._address)}")

    def _on_report(self, report: pb.Report) -> None:
        if report.HasField("result"):
            self._on_result(report.result)
        else:
            self._on_failed_call(report.failure)

    def _on_result(self, result: pb.Result) -> None:
        with self._lock:
            pending = self._pending.pop(result.seq, None)
        if pending is None:  # failed meanwhile
            return
        try:
            value = decode(result.payload)
        except Exception as error:  # noqa: BLE001 - whatever unpickling raises belongs to the one who waits
            pending.reply.set_exception(error)
        else:
            pending.reply.set_result(value)

    def _on_failed_call(self, failure: pb.Failure) -> None:
        error = rebuild(failure, self.name)
        with self._lock:
            pending = self._pending.get(failure.seq)
            recoverable = pending is not None and not pending.fatal
            if recoverable:
                del self._pending[failure.seq]
        if pending is not None and recoverable:
            pending.reply.set_exception(error)
        else:
            self.fail(error)
