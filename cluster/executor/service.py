"""The worker's end of the control stream: authenticates the engine, queues its calls, sends reports.

    engine --Call--> calls (queue) --> `host` executes
    engine <-Report- reports (queue) <-- `host`

One engine for the life of the process: when its stream ends, `on_end` is called and ends the process. Who may connect
is decided twice: by mutual TLS with the rack's certificates before a byte is read, then by this worker's token.
"""

import contextlib
import hmac
import os
import platform
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata

import grpc

from pomarium.cluster.executor.channel import SERVER_OPTIONS
from pomarium.proto import control_pb2 as pb
from pomarium.proto import control_pb2_grpc as pb_grpc
from pomarium.worker.address import authority
from pomarium.worker.handoff.credentials import Tls, bind, check_private

AUTHORIZATION = "authorization"


def bearer(token: str) -> str:
    """Value of the authorization metadata for `token`."""
    return f"Bearer {token}"


def ready() -> pb.Ready:
    """What this process is."""
    return pb.Ready(
        pid=os.getpid(),
        pomarium_version=metadata.version("pomarium"),
        python_version=".".join(platform.python_version_tuple()[:2]),
    )


class ControlService(pb_grpc.WorkerServicer):
    """One control stream.

    Attributes:
        calls: what the engine sent, in order.
    """

    def __init__(self, token: str, on_end: Callable[[], None]) -> None:
        self.calls: queue.SimpleQueue[pb.Call | None] = queue.SimpleQueue()
        self._reports: queue.SimpleQueue[pb.Report | None] = queue.SimpleQueue()
        self._expected = bearer(token).encode()
        self._on_end = on_end
        self._unclaimed = threading.Semaphore(1)

    def report(self, report: pb.Report) -> None:
        """Send a report, in the order of the calls of this method."""
        self._reports.put(report)

    def Control(self, request_iterator: Iterator[pb.Call], context: grpc.ServicerContext) -> Iterator[pb.Report]:  # noqa: N802
        """The stream of `proto/control.proto`."""
        offered = str(dict(context.invocation_metadata()).get(AUTHORIZATION, "")).encode()
        if not hmac.compare_digest(offered, self._expected):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "this worker belongs to an engine with another token")
        if not self._unclaimed.acquire(blocking=False):
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this worker already has an engine")
        threading.Thread(target=self._read, args=(request_iterator,), name="control-calls", daemon=True).start()
        yield pb.Report(ready=ready())
        # None: the engine is gone. Waiting on would hold a thread of the pool, which Python joins when it exits.
        while (report := self._reports.get()) is not None:
            yield report

    def _read(self, calls: Iterator[pb.Call]) -> None:
        with contextlib.suppress(grpc.RpcError):  # ended or broken: either way the engine is gone
            for call in calls:
                self.calls.put(call)
        self._reports.put(None)
        self._on_end()


def serve(
    service: ControlService, host: str, tls: Tls | None = None, allow_plaintext: bool = False
) -> tuple[grpc.Server, str]:
    """Start the service on a free port of `host` and nowhere else; returns the server and its address.

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
    server.start()
    return server, authority(host, port)
