"""A worker process that listens, and what it is to be told before it loads anything: facts only."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.cluster.executor.actor import Endpoint
from pomarium.worker.pipeline.place import StagePlace, Surroundings


@dataclass(frozen=True)
class Contact:
    """What an engine needs to drive a worker process."""

    endpoint: Endpoint
    token: str


@dataclass(frozen=True)
class Member:
    """One of the workers of a replica.

    Attributes:
        mac: name of its Mac.
        source: the model, as worker.models.resolve takes it.
        layers: half-open range; None for a worker that runs the whole model.
        workers: that its machine may run, by the resources that the node offers; they share its memory.
    """

    contact: Contact
    mac: str
    source: str
    layers: tuple[int, int] | None = None
    workers: int = 1


def surroundings(members: Sequence[Member]) -> tuple[Surroundings, ...]:
    """What each worker is told, by rank: one plan, with an epoch and a token of its own."""
    cuts = tuple(member.layers for member in members if member.layers is not None)
    if not cuts:
        return tuple(Surroundings(member.workers, member.source) for member in members)
    epoch, token = time.time_ns() // 1000, secrets.token_urlsafe(32)
    return tuple(
        Surroundings(member.workers, member.source, StagePlace(rank, cuts, epoch, token, member.contact.endpoint.host))
        for rank, member in enumerate(members)
    )
