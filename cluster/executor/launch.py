"""Starts the worker processes of one engine and opens a link to each: everything between Ray and the executor.

    Reservation --start: Ray actor per bundle--> WorkerProcess --contacts--> Contact --connect--> RemoteWorker

Who starts them need not be who drives them: a Serve replica starts them ahead of its engine (`handover`).
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pomarium.cluster.executor.actor import Endpoint, WorkerActor
from pomarium.cluster.executor.bundles import Reservation
from pomarium.cluster.executor.codec import WorkerLostError
from pomarium.cluster.executor.link import WorkerLink
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.executor.service import ready
from pomarium.cluster.executor.survey import alive
from pomarium.cluster.node.worker_environment import (
    RESOURCE,
    local_ranks,
    override_warning,
    parted,
    worker_environment,
)
from pomarium.proto import control_pb2 as pb
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.handoff.credentials import plaintext_allowed, tls_of

# Below vLLM's logger, which has a handler in every process; importing vLLM for its own would cost seconds.
logger = logging.getLogger("vllm.pomarium.executor")

ACTOR_TIMEOUT_S = 120.0
"""A Python process with Ray and gRPC in it; seconds on an idle machine."""
WATCH_S = 0.5
"""How often is looked whether the nodes are still there."""
CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class WorkerProcess:
    """A process that Ray starts.

    Attributes:
        actor: ends with the last handle to it, and with the process that started it.
        token: what the engine has to show.
        listening: Ray's reference to the Endpoint.
    """

    actor: ActorHandle[Any]
    token: str
    listening: "ray.ObjectRef[Endpoint]"


@dataclass(frozen=True)
class RemoteWorker:
    """A worker with a link to it.

    Attributes:
        local_rank: its index among this engine's workers on its node, and the index of its device.
    """

    rank: int
    local_rank: int
    member: Member
    link: WorkerLink


def start(reservation: Reservation) -> tuple[WorkerProcess, ...]:
    """Have Ray start a process on each bundle, in rank order, and do not wait for it."""
    devices = local_ranks(reservation.nodes)
    if warning := override_warning(os.environ, devices):
        logger.warning(warning)
    return tuple(_start_process(reservation, rank, device) for rank, device in enumerate(devices))


def contacts(processes: Sequence[WorkerProcess], reservation: Reservation) -> tuple[Contact, ...]:
    """Wait until all processes listen. Raises WorkerLostError if one does not start, or loses its node meanwhile."""
    deadline, missing = time.monotonic() + ACTOR_TIMEOUT_S, [process.listening for process in processes]
    while missing:
        _, missing = ray.wait(missing, num_returns=len(missing), timeout=WATCH_S)
        if missing and not alive(set(reservation.nodes)):
            raise WorkerLostError("a node was lost while its worker process started")
        if missing and time.monotonic() > deadline:
            raise WorkerLostError(f"Ray did not start the worker processes within {ACTOR_TIMEOUT_S:g} s")
    try:
        endpoints = ray.get([process.listening for process in processes])
    except RayError as error:
        raise WorkerLostError(f"Ray could not start the worker processes: {error}") from error
    return tuple(Contact(endpoint, process.token) for endpoint, process in zip(endpoints, processes, strict=True))


def connect(members: Sequence[Member], on_failure: Callable[[int, Exception], None]) -> tuple[RemoteWorker, ...]:
    """Open a link to each worker, in rank order. `on_failure(rank, error)` is called at most once per worker, from its
    own thread.

    Raises:
        WorkerLostError: one is gone.
        UnsupportedError: it runs another version.
        CredentialsError, PlaintextRefusedError: it is of another rack, or of none.
    """
    links: list[WorkerLink] = []
    tls, plaintext = tls_of(os.environ), plaintext_allowed(os.environ)
    try:
        for rank, member in enumerate(members):
            endpoint = member.contact.endpoint
            name = f"worker {rank} ({_on_mac(member)}pid {endpoint.pid} at {endpoint.address})"
            failed = partial(on_failure, rank)
            links.append(WorkerLink(name, endpoint.address, member.contact.token, failed, tls, plaintext))
        for link in links:
            check_versions(link.name, link.wait_ready(CONNECT_TIMEOUT_S), ready())
    except BaseException:
        for link in links:
            link.close()
        raise
    local = local_ranks([member.contact.endpoint.node_id for member in members])
    return tuple(RemoteWorker(rank, local[rank], members[rank], link) for rank, link in enumerate(links))


def _on_mac(member: Member) -> str:
    return f"on {member.mac}, " if member.mac != member.contact.endpoint.host else ""


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


def kill(processes: Sequence[WorkerProcess]) -> None:
    """End the processes, unless Ray is gone already and they with it."""
    if ray.is_initialized():
        for process in processes:
            ray.kill(process.actor, no_restart=True)


def _start_process(reservation: Reservation, rank: int, device: int) -> WorkerProcess:
    token = secrets.token_urlsafe(32)
    variables, secret = parted(worker_environment(os.environ, device))
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
            runtime_env={"env_vars": variables},
        )
        .remote(rank, token, secret)
    )
    return WorkerProcess(actor, token, actor.listen.remote())
