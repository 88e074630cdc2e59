"""The processes of Ray Serve, as Ray's head knows them: which live, and what the others ended of.

    Ray's table of actors --read--> ServeActors --parts--> one Part for each piece that an endpoint needs

Ray's head sees the end of a process at once and that of a machine within seconds; Serve's controller, which knows more,
may be dead itself. A process of Ray's (driver, actor) can call `read` at once; any other calls `reports.use` before.
"""

import asyncio
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.experimental import internal_kv

READ_S = 5.0
"""How long Ray's head has to answer."""

MESSAGE = 200
"""Characters of a message of Ray's that are shown."""

CONTROLLER, INGRESS, ENGINE = "controller", "ingress", "engine"
"""Kinds of parts, in the order in which they are told."""

_NAME = re.compile(r"SERVE_REPLICA::(?P<app>[^#]*)#(?P<deployment>[^#]*)#(?P<replica>[^#]*)")
_INGRESS_DEPLOYMENT, _ENGINE_DEPLOYMENT = "ingress", "engine:"
_BY_ITSELF = "INTENDED"
"""In Ray's word on how a process ended that was asked to."""


@dataclass(frozen=True)
class ServeActor:
    """A process of Serve's.

    Attributes:
        kind: CONTROLLER, INGRESS or ENGINE. deployment: Serve's name, of the latter two.
        replica: Serve's name, unique.
        alive: it runs. coming: it is being started, for the first time or again.
        end: what it ended of, a clause, if it did and nobody had asked it to.
        began, ended: Unix time, seconds; 0 for what is not over.
        restarts: how often Ray has started it again. node: Ray's id of that which it runs on, hex.
    """

    kind: str
    deployment: str = ""
    replica: str = ""
    alive: bool = False
    coming: bool = False
    end: str | None = None
    began: float = 0.0
    ended: float = 0.0
    restarts: int = 0
    node: str = ""


@dataclass(frozen=True)
class Part:
    """What an endpoint needs and does not have.

    Attributes:
        what: such as "the ingress". why: what the last one ended of, a clause; None: nothing has ended.
        coming: one is being started.
    """

    what: str
    why: str | None
    coming: bool

    def __str__(self) -> str:
        if self.why is None:
            return f"{self.what} is {'being started' if self.coming else 'not there'}"
        return f"{self.what} was lost: {self.why}{'; another is being started' if self.coming else ''}"


def read() -> tuple[ServeActor, ...]:
    """All, the dead ones too, the oldest first. Raises RayError or RpcError if the head does not answer."""
    client = internal_kv.internal_kv_get_gcs_client()

    async def table() -> Mapping[Any, ActorTableData]:
        found: Mapping[Any, ActorTableData] = await client.async_get_all_actor_info(None, None, None, timeout=READ_S)
        return found

    known = (_serve_actor(entry) for entry in asyncio.run(table()).values())
    return tuple(sorted((actor for actor in known if actor is not None), key=lambda actor: actor.began))


def gone(actors: Iterable[ServeActor]) -> frozenset[str]:
    """Replicas whose process has ended."""
    return frozenset(actor.replica for actor in actors if actor.replica and not actor.alive)


def running(actors: Iterable[ServeActor]) -> frozenset[str]:
    """Replicas whose process runs, be it that it still starts its engine."""
    return frozenset(actor.replica for actor in actors if actor.replica and actor.alive)


def missing(actors: Sequence[ServeActor], serving: Collection[str]) -> tuple[Part, ...]:
    """The parts that an endpoint is without, if there is one: what was ended on purpose is missed by nobody.

    Args:
        actors: the oldest first. serving: engines that say that they serve, by replica; for a process that runs may
            still be starting its engine.
    """
    pieces: dict[tuple[str, str], list[ServeActor]] = {}
    for actor in actors:
        pieces.setdefault((actor.kind, actor.deployment), []).append(actor)
    ended = any(kind == CONTROLLER and not _meant(ones) for (kind, _), ones in pieces.items())
    if ended or not any(_meant(ones) for (kind, _), ones in pieces.items() if kind in (INGRESS, ENGINE)):
        return ()
    found = []
    for (kind, deployment), ones in sorted(pieces.items(), key=lambda piece: _order(piece[0])):
        there = any(one.alive and (kind != ENGINE or one.replica in serving) for one in ones)
        if there or not (_meant(ones) or kind == CONTROLLER):
            continue
        what = f"{kind} of {deployment.removeprefix(_ENGINE_DEPLOYMENT)}" if kind == ENGINE else kind
        why = next((one.end for one in reversed(ones) if one.end), None)
        found.append(Part(f"the {what}", why, any(one.alive or one.coming for one in ones)))
    return tuple(found)


def _meant(ones: Sequence[ServeActor]) -> bool:
    """Whether such a piece is to be there: the last one is, or comes, or ended against everybody's will."""
    return ones[-1].alive or ones[-1].coming or ones[-1].end is not None


def _order(piece: tuple[str, str]) -> tuple[int, str]:
    return (CONTROLLER, INGRESS, ENGINE).index(piece[0]), piece[1]


def _serve_actor(entry: ActorTableData) -> ServeActor | None:
    kind, deployment, replica = CONTROLLER, "", ""
    if match := _NAME.fullmatch(entry.name):
        deployment, replica = match["deployment"], match["replica"]
        if deployment != _INGRESS_DEPLOYMENT and not deployment.startswith(_ENGINE_DEPLOYMENT):
            return None
        kind = INGRESS if deployment == _INGRESS_DEPLOYMENT else ENGINE
    elif entry.name != "SERVE_CONTROLLER_ACTOR":
        return None
    dead = entry.state == ActorTableData.DEAD
    alive = entry.state == ActorTableData.ALIVE
    end = _end(entry) if dead or entry.state == ActorTableData.RESTARTING else None
    began, ended = entry.start_time / 1000, entry.end_time / 1000
    coming = not dead and not alive
    node = entry.address.node_id.hex()
    return ServeActor(kind, deployment, replica, alive, coming, end, began, ended, entry.num_restarts, node)


def _end(entry: ActorTableData) -> str | None:
    """Why it ended, a clause; None if that was asked for."""
    if entry.state == ActorTableData.RESTARTING:
        return "its process crashed or was killed"
    cause = entry.death_cause
    context = cause.WhichOneof("context")
    if context == "actor_died_error_context":
        died = cause.actor_died_error_context
        if died.reason == ActorDiedErrorContext.NODE_DIED:
            return f"its machine, {died.node_ip_address}, is gone"
        if died.reason == ActorDiedErrorContext.WORKER_DIED and _BY_ITSELF not in died.error_message:
            return (
                f"its process (pid {died.pid} at {died.node_ip_address}) crashed or was killed, as by signal 9, which "
                "the system sends when memory runs out"
            )
        return None
    messages = {
        "runtime_env_failed_context": cause.runtime_env_failed_context.error_message,
        "actor_unschedulable_context": cause.actor_unschedulable_context.error_message,
        "oom_context": cause.oom_context.error_message,
        "creation_task_failure_context": "it failed when it was made",
    }
    message = " ".join(messages.get(context or "", "").split())
    return f"Ray says: {message[:MESSAGE].rstrip('.')}" if message else None
