"""Starts the worker processes of one engine and opens a link to each: everything between Ray and the executor.

Reservation --Ray actor per bundle--> Endpoint --control stream--> WorkerLink
"""

import logging
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pomarium.cluster.executor.actor import Endpoint, WorkerActor
from pomarium.cluster.executor.bundles import Reservation
from pomarium.cluster.executor.codec import WorkerLostError
from pomarium.cluster.executor.environment import RESOURCE, local_ranks, override_warning, worker_environment
from pomarium.cluster.executor.link import WorkerLink
from pomarium.cluster.executor.service import ready
from pomarium.proto import control_pb2 as pb
from pomarium.worker.errors import UnsupportedError

# Below vLLM's logger, which has a handler in every process; importing vLLM for its own would cost seconds.
logger = logging.getLogger("vllm.pomarium.executor")

ACTOR_TIMEOUT_S = 120.0
"""A Python process with Ray and gRPC in it; seconds on an idle machine."""
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class RemoteWorker:
    """A started worker.

    Attributes:
        local_rank: its index among this engine's workers on its node, and the index of its device.
    """

    rank: int
    local_rank: int
    endpoint: Endpoint
    actor: ActorHandle[Any]
    link: WorkerLink


def launch(reservation: Reservation, on_failure: Callable[[int, Exception], None]) -> tuple[RemoteWorker, ...]:
    """Start a worker on each bundle. `on_failure(rank, error)` is called at most once per worker, from its own thread.

    Raises WorkerLostError if one does not start, UnsupportedError if it runs another version.
    """
    devices = local_ranks(reservation.nodes)
    if warning := override_warning(os.environ, devices):
        logger.warning(warning)
    tokens = [secrets.token_urlsafe(32) for _ in devices]
    actors: list[ActorHandle[Any]] = []
    links: list[WorkerLink] = []
    try:
        for rank, (device, token) in enumerate(zip(devices, tokens, strict=True)):
            actors.append(_start_actor(reservation, rank, device, token))
        endpoints = _endpoints(actors)
        for rank, (endpoint, token) in enumerate(zip(endpoints, tokens, strict=True)):
            name = f"worker {rank} (pid {endpoint.pid} at {endpoint.address})"
            links.append(WorkerLink(name, endpoint.address, token, partial(on_failure, rank)))
        for link in links:
            check_versions(link.name, link.wait_ready(CONNECT_TIMEOUT_S), ready())
    except BaseException:
        for link in links:
            link.close()
        kill(actors)
        raise
    return tuple(
        RemoteWorker(rank, device, endpoint, actor, link)
        for rank, (device, endpoint, actor, link) in enumerate(zip(devices, endpoints, actors, links, strict=True))
    )


def check_versions(worker: str, theirs: pb.Ready, ours: pb.Ready) -> None:
    """Raises UnsupportedError unless both ends run the same Pomarium and Python: they exchange pickles."""
    for what, there, here in (
        ("Pomarium", theirs.pomarium_version, ours.pomarium_version),
        ("Python", theirs.python_version, ours.python_version),
    ):
        if there != here:
            raise UnsupportedError(
                f"{worker} runs {what} {there} but the engine runs {here}; install the same version on both machines."
            )


def kill(actors: Sequence[ActorHandle[Any]]) -> None:
    """End the processes, unless Ray is gone already and they with it."""
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor, no_restart=True)


def _start_actor(reservation: Reservation, rank: int, device: int, token: str) -> ActorHandle[Any]:
    strategy = PlacementGroupSchedulingStrategy(
        reservation.group, placement_group_bundle_index=reservation.bundles[rank]
    )
    actor: ActorHandle[Any] = (
        ray.remote(WorkerActor)
        .options(
            num_cpus=0,
            resources={RESOURCE: 1},
            max_restarts=0,
            max_task_retries=0,
            scheduling_strategy=strategy,
            runtime_env={"env_vars": worker_environment(os.environ, device)},
        )
        .remote(rank, token)
    )
    return actor


def _endpoints(actors: Sequence[ActorHandle[Any]]) -> list[Endpoint]:
    try:
        endpoints: list[Endpoint] = ray.get([actor.listen.remote() for actor in actors], timeout=ACTOR_TIMEOUT_S)
    except GetTimeoutError:
        raise WorkerLostError(f"Ray did not start the worker processes within {ACTOR_TIMEOUT_S:g} s") from None
    except RayError as error:
        raise WorkerLostError(f"Ray could not start the worker processes: {error}") from error
    return endpoints
