"""The Ray actor of one worker: Ray places, starts and ends it; the engine's calls come over a wire of their own.

Nothing here imports vLLM, torch or MLX before `listen` has answered: the actor's environment (device indices, threads,
BLAS) has to be in place before any of them is loaded.
"""

import os
import threading
from dataclasses import dataclass

import ray

from pomarium.cluster.executor.codec import describe
from pomarium.cluster.executor.lean_import import import_vllm, without_collections
from pomarium.cluster.executor.service import ControlService, serve
from pomarium.cluster.node.worker_environment import Secrets
from pomarium.proto import control_pb2 as pb
from pomarium.worker.address import host_of
from pomarium.worker.handoff.credentials import plaintext_allowed, tls_of


@dataclass(frozen=True)
class Endpoint:
    """Where a worker is to be found.

    Attributes:
        address: host:port of its control service, the host being the node's Ray address.
    """

    address: str
    pid: int
    node_id: str

    @property
    def host(self) -> str:
        """The node's address, without brackets."""
        return host_of(self.address)


class WorkerActor:
    """Process of one worker. Made with `ray.remote`, one per bundle that carries the resource `mlx`."""

    def __init__(self, rank: int, token: str, secrets: Secrets) -> None:
        secrets.enter(os.environ)
        # Ray sets it from num_cpus=0; it would hold BLAS to one thread.
        os.environ.pop("OMP_NUM_THREADS", None)
        self._rank = rank
        # The engine is gone: whatever runs here is for nobody. No cleanup can be waited for (the step may be stuck).
        self._service = ControlService(token, on_end=lambda: os._exit(0))
        tls, plaintext = tls_of(os.environ), plaintext_allowed(os.environ)
        self._server, self._address = serve(self._service, ray.util.get_node_ip_address(), tls, plaintext)

    def listen(self) -> Endpoint:
        """Begin to execute calls."""
        threading.Thread(target=self._work, name="worker", daemon=True).start()
        return Endpoint(self._address, os.getpid(), ray.get_runtime_context().get_node_id())

    def _work(self) -> None:
        try:
            with without_collections():
                import_vllm()
                from pomarium.cluster.executor.host import WorkerHost

            host = WorkerHost(self._rank)
        except BaseException as error:
            # The engine waits for its first call: that one fails.
            self._service.report(pb.Report(failure=describe(0, "starting", error)))
            raise
        host.run(self._service.calls, self._service.report)
