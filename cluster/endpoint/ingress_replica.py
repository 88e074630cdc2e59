"""The ingress as a deployment of Ray Serve's that listens by itself: no proxy of Serve's stands before it.

    Serve --starts, checks, ends--> IngressReplica: HttpServer --ASGI--> Ingress
    of several on one machine: one port (shared_port.py), and what each knows of the engines (siblings.py)

Serve's proxy would be one more process for each byte of an answer, and costs more than the ingress itself. Serve keeps
what it is good for: it starts the processes, finds that one has died, and starts another.
"""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.handle import DeploymentHandle
from ray.util.metrics import Counter, Histogram

from pomarium.cluster import faults
from pomarium.cluster.endpoint import ledger, reasons, shared_port
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.on_demand import OnDemand, OnDemandModels
from pomarium.cluster.endpoint.relay import ENDS
from pomarium.cluster.endpoint.siblings import Siblings
from pomarium.cluster.http.door import Bounds
from pomarium.cluster.http.http_server import HttpServer
from pomarium.cluster.http.protocols import GENERATED, MESSAGES, OTHER_KINDS, RESPONSES
from pomarium.cluster.node.ray_folder import session_folder
from pomarium.cluster.node.ray_names import label
from pomarium.cluster.replica.serve_plan import APP_NAME, LIMITS, Batches, Limits
from pomarium.worker import settings
from pomarium.worker.address import authority

FREE_S = 10.0
"""For how long the port of an ingress that was lost may still be taken."""

FAREWELL_S = 3.0
"""For clients to take what tells them that the endpoint ends."""

WAITS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

SHOWN = (
    "/", "/health", "/metrics", "/version", "/v1/rack", "/v1/models", "/v1/files", "/v1/batches", RESPONSES, MESSAGES
)  # fmt: skip
"""Paths that requests are counted by, with all below them, beside GENERATED and OTHER_KINDS."""


class IngressReplica:
    """Serve deployment class."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self,
        host: str,
        port: int,
        origins: Sequence[str],
        engines: Mapping[str, DeploymentHandle],
        api_keys: frozenset[str],
        batches: Batches,
        served: Mapping[str, Served],
        created: int,
        on_demand: OnDemandModels | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        """`host`, `port`: where it listens, from now on. `origins`: see ServePlan. `on_demand`: models that come and
        go; None: none does. The others are Ingress's.

        Raises:
            StartError: it cannot listen there.
        """
        # With options() a handle begins to learn of its replicas, so that the first request finds them, also when Ray's
        # head has ended meanwhile.
        known = {name: engine.options() for name, engine in engines.items()}
        self._on_demand = None if on_demand is None else OnDemand(on_demand, reasons.states, _scale)
        self._ingress = ingress = Ingress(
            known, api_keys, batches, served, created, on_demand=self._on_demand, limits=limits, resumed=_resumptions()
        )
        counter = Counter("pomarium_http_requests", "Requests that are over.", tag_keys=("method", "route", "status"))

        def count(method: str, path: str, status: int) -> None:
            counter.inc(tags={"method": method, "route": route_of(path), "status": str(status)})

        folder = Path(session_folder()) / f"ingress-{port}"
        listener = await _listener(folder, host, port)
        self._siblings = Siblings(ledger.of_this_process())
        await self._siblings.start(folder)
        self._server = HttpServer(ingress, listener, Bounds.of(settings.load(os.environ)), count, origins)
        if self._on_demand is not None:
            await self._on_demand.start()
        await ingress.open()
        await self._server.start()

    def check_health(self) -> None:
        """Serve asks this every few seconds. Raises RuntimeError if it does not listen any more."""
        self._server.check()
        if self._on_demand is not None:
            self._on_demand.check()

    async def __del__(self) -> None:
        """Serve calls this when it is to end, and waits for graceful_shutdown_timeout_s. Nearly all of that is for what
        runs to be answered; then who still waits is told."""
        draining = asyncio.ensure_future(self._server.drain())
        await asyncio.wait({draining}, timeout=max(0.0, _serve_waits_s() - FAREWELL_S))
        if self._on_demand is not None:
            self._on_demand.end(ENDS)
        self._ingress.end()
        await draining


def _resumptions() -> Callable[[str, float], None]:
    """Counts requests that went on at another engine."""
    went_on = Counter("pomarium_resumed_requests", "Requests that went on at another engine.", tag_keys=("model",))
    waits = Histogram(
        "pomarium_resume_seconds", "How long their clients waited.", boundaries=list(WAITS_S), tag_keys=("model",)
    )

    def resumed(model: str, waited_s: float) -> None:
        tags = {"model": label(model)}
        went_on.inc(tags=tags)
        waits.observe(waited_s, tags=tags)

    return resumed


def _serve_waits_s() -> float:
    """How long Serve waits for this replica's end: a file of Serve's may say so (deploy/serve.example.yaml)."""
    return float(serve.get_replica_context()._deployment_config.graceful_shutdown_timeout_s)


async def _scale(deployment: str, engines: int) -> None:
    """Have Serve run so many of it. Raises RayError while its controller cannot be told."""
    try:
        controller = await asyncio.to_thread(ray.get_actor, SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
    except ValueError as error:  # it is being replaced
        raise RayError(str(error)) from error
    await controller.update_deployment_replicas.remote(DeploymentID(deployment, APP_NAME), engines)


async def _listener(folder: Path, host: str, port: int) -> socket.socket:
    deadline = asyncio.get_running_loop().time() + FREE_S
    while True:
        try:
            return await asyncio.to_thread(shared_port.take, folder, host, port)
        except OSError as error:
            if asyncio.get_running_loop().time() > deadline:
                raise faults.StartError(
                    f"Cannot listen on {authority(host, port)} ({error.strerror}): end what listens there, or choose "
                    "another port. Serve's own proxy does, unless `proxy_location: Disabled` stands in its file."
                ) from error
        await asyncio.sleep(0.2)


def route_of(path: str) -> str:
    """What a request for `path` is counted as: one of few names, whatever clients send."""
    if path in GENERATED or path in OTHER_KINDS:
        return path
    return next((known for known in SHOWN if path == known or path.startswith(f"{known}/")), "other")
