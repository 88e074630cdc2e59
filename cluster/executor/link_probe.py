"""The links of a running rack, measured between its Macs with what the stages themselves use to hand tensors on.

    nodes of the rack --probers: one Ray actor per Mac, each with a HandoffServer--> Prober ...
        --measure(here, there): the actor of one probes the server of the other--> Measured: figures, or why none

The actors take no `mlx`, so a rack that serves can be measured; the figures are then what the models leave. Whoever
measures does so for one direction after the other, so that no measurement takes another's bandwidth.
"""

import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.rack.link_report import Measured
from pomarium.worker.address import authority
from pomarium.worker.errors import PomariumError
from pomarium.worker.handoff.credentials import PLAINTEXT_VARIABLE, Tls, plaintext_allowed, tls_of
from pomarium.worker.handoff.errors import HandoffError
from pomarium.worker.handoff.probe import CONNECT_S, LinkFacts, probe
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings

START_TIMEOUT_S = 60.0
"""For all Macs together: a Python process with Ray, gRPC and MLX in it; seconds on an idle machine."""
ANSWER_S = 5.0
"""For Ray's part in a measurement, beside the bound that `worker.handoff.probe` keeps."""


class ProbeError(PomariumError):
    """A Mac could not be asked to measure."""


class ProbeActor:
    """One Mac's end of every measurement. Made with `ray.remote` on its node."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._tls: Tls | None = None
        self._settings = HandoffSettings()
        self._server: HandoffServer | None = None

    def listen(self) -> str:
        """HOST:PORT of this Mac's server. Raises SettingsError, PlaintextRefusedError, CredentialsError or OSError."""
        self._tls = tls_of(os.environ)
        self._settings = HandoffSettings(allow_plaintext=plaintext_allowed(os.environ))
        bind = authority(ray.util.get_node_ip_address(), 0)
        self._server = HandoffServer(bind, 0, self._token, self._tls, self._settings)
        return self._server.address

    def measure(self, address: str, seconds: float) -> LinkFacts | str:
        """The link to another Mac's server, or why it could not be measured."""
        try:
            return probe(address, self._token, self._tls, self._settings, seconds)
        except HandoffError as error:
            return str(error)


@dataclass(frozen=True)
class Prober:
    """A Mac that is ready to measure. `address`: HOST:PORT of its server."""

    name: str
    actor: "ActorHandle[Any]"
    address: str


@contextmanager
def probers(
    nodes: Sequence[RackNode], names: Sequence[str], environ: Mapping[str, str]
) -> Iterator[tuple[Prober, ...]]:
    """An actor on each node while the context is open, `names` in the order of `nodes`.

    Raises:
        ProbeError: one does not start. PomariumError: one refuses to listen, as it would for a model.
    """
    token = secrets.token_urlsafe(32)
    allowed = {name: environ[name] for name in (PLAINTEXT_VARIABLE,) if name in environ}
    actors = [_start(node, token, allowed) for node in nodes]
    try:
        listening = [actor.listen.remote() for actor in actors]
        deadline = time.monotonic() + START_TIMEOUT_S
        addresses = [_await(name, ref, deadline) for name, ref in zip(names, listening, strict=True)]
        yield tuple(Prober(*facts) for facts in zip(names, actors, addresses, strict=True))
    finally:
        for actor in actors:
            ray.kill(actor)


def measure(here: Prober, there: Prober, seconds: float) -> Measured:
    """The link from one Mac to another, in about `seconds`; bounded also where either is frozen."""
    limit = seconds + CONNECT_S + ANSWER_S
    try:
        result: LinkFacts | str = ray.get(here.actor.measure.remote(there.address, seconds), timeout=limit)
    except GetTimeoutError:
        result = f"{here.name} did not answer within {limit:g} s"
    except RayError as error:
        result = f"{here.name} could not be asked: {_first_line(error)}"
    return Measured(here.name, there.name, result)


def _start(node: RackNode, token: str, environ: Mapping[str, str]) -> "ActorHandle[Any]":
    strategy = NodeAffinitySchedulingStrategy(node.id, soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": strategy, "runtime_env": {"env_vars": dict(environ)}}
    actor: ActorHandle[Any] = ray.remote(ProbeActor).options(**options).remote(token)
    return actor


def _await(name: str, listening: "ray.ObjectRef[str]", deadline: float) -> str:
    try:
        address: str = ray.get(listening, timeout=max(deadline - time.monotonic(), 0.0))
    except GetTimeoutError:
        raise ProbeError(
            f"{name} did not start to measure within {START_TIMEOUT_S:g} s: look whether it is up."
        ) from None
    except RayTaskError as error:
        if isinstance(error.cause, PomariumError):
            raise type(error.cause)(f"{name}: {error.cause}") from None
        raise
    except RayError as error:
        raise ProbeError(f"{name} could not be asked to measure: {_first_line(error)}") from None
    return address


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
