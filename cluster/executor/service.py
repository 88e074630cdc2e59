"""The worker's end of control: authenticates the engine, queues its calls, sends reports.

    engine --Attend--> Ready: the wire's port and key. The stream then stands still, and ends with either
    engine ==Call====> calls (queue) --> `host` executes        over the wire, read by a thread
    engine <==Report== `host`                                   over the wire, written by the thread that executed

One engine for the life of the process: when its stream ends, `on_end` is called and ends the process. Who may connect
is decided twice: by mutual TLS with the rack's certificates before a byte is read, then by this worker's token. The
wire's key is told to nobody else.
"""

import contextlib
import hmac
import os
import platform
import queue
import secrets
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata

import grpc

from pomarium.cluster.executor.channel import SERVER_OPTIONS
from pomarium.cluster.executor.entrance import Entrance
from pomarium.cluster.executor.wire import Wire
from pomarium.cluster.http.sealing import KEY_BYTES
from pomarium.proto import control_pb2 as pb
from pomarium.proto import control_pb2_grpc as pb_grpc
from pomarium.worker.address import authority
from pomarium.worker.handoff.credentials import Tls, bind, check_private

AUTHORIZATION = "authorization"


def bearer(token: str) -> str:
    """Value of the authorization metadata for `token`."""
    return f"Bearer {token}"


def ready(port: int = 0, key: bytes = b"") -> pb.Ready:
    """What this process is, and where its wire begins."""
    return pb.Ready(
        pid=os.getpid(),
        pomarium_version=metadata.version("pomarium"),
        python_version=".".join(platform.python_version_tuple()[:2]),
        port=port,
        key=key,
    )


class ControlService(pb_grpc.WorkerServicer):
    """One engine.

    Attributes:
        calls: what the engine sent, in order.
    """

    def __init__(self, token: str, on_end: Callable[[], None]) -> None:
        self.calls: queue.SimpleQueue[pb.Call | None] = queue.SimpleQueue()
        self._expected = bearer(token).encode()
        self._on_end = on_end
        self._unclaimed = threading.Semaphore(1)
        self._entrance: Entrance | None = None
        self._wire: Future[Wire] = Future()
        self._over = threading.Event()

    def open(self, host: str) -> None:
        """Listen for the wire on `host`. Raises OSError."""
        self._entrance = Entrance(host)

    def report(self, report: pb.Report) -> None:
        """Send a report, in the order of the calls of this method; waits for an engine, and while it takes nothing."""
        wire = self._wire.result()
        try:
            wire.send(report.SerializeToString())
        except OSError:
            wire.cut()  # an engine that is still there must not wait for this report

    def Attend(self, request: pb.Engine, context: grpc.ServicerContext) -> Iterator[pb.Ready]:  # noqa: N802
        """The stream of `proto/control.proto`."""
        offered = str(dict(context.invocation_metadata()).get(AUTHORIZATION, "")).encode()
        if not hmac.compare_digest(offered, self._expected):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker belongs to an engine with another token")
        if not self._unclaimed.acquire(blocking=False):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker already has an engine")
        assert self._entrance is not None
        key = secrets.token_bytes(KEY_BYTES)
        threading.Thread(target=self._read, args=(self._entrance, key), name="control-calls", daemon=True).start()
        if not context.add_callback(self._end):
            self._end()
        yield ready(self._entrance.port, key)
        # Without end it would hold a thread of the pool, which Python joins when it exits.
        self._over.wait()

    def _read(self, entrance: Entrance, key: bytes) -> None:
        with contextlib.suppress(OSError):  # the engine sees it too and ends the stream
            wire = entrance.admit(key)
            self._wire.set_result(wire)
            with contextlib.closing(wire):
                while not self._over.is_set():
                    self.calls.put(pb.Call.FromString(wire.receive()))

    def _end(self) -> None:
        self._over.set()
        if self._wire.done():
            self._wire.result().cut()
        self._on_end()


def serve(
    service: ControlService, host: str, tls: Tls | None = None, allow_plaintext: bool = False
) -> tuple[grpc.Server, str]:
    """Start the service on two free ports of `host` and nowhere else; returns the server and its address.

    Args:
        tls: asks the engine for a certificate of the same rack. Without it, `host` must be a loopback address.
        allow_plaintext: unless nobody else can reach the network, as the user says.

    Raises PlaintextRefusedError, CredentialsError or OSError.
    """
    address = authority(host, 0)
    check_private(address, tls, allow_plaintext)
    server = grpc.server(ThreadPoolExecutor(4, thread_name_prefix="control"), options=SERVER_OPTIONS)
    pb_grpc.add_WorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    port = bind(server, address, tls)
    service.open(host)
    server.start()
    return server, authority(host, port)
