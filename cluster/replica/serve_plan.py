"""What is to be served, as plain facts, and the pure decisions about it. Imports neither Ray nor vLLM.

command line --> ServePlan --> app.py (Ray Serve application) --> replica.py (one replica per model copy)
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pomarium.cluster.node import ray_names
from pomarium.cluster.placement.model import Network
from pomarium.cluster.rack.inventory import KEEP_S, LOAD, ReplicasEntry
from pomarium.worker.address import http_url
from pomarium.worker.errors import SettingsError
from pomarium.worker.home import user_path

RESOURCE = "mlx"
"""Ray resource that a machine offers once per worker it can run."""

APP_NAME = "pomarium"
"""Of the endpoint among Serve's applications."""

ENDPOINT = "endpoint"
"""The group of engines that the endpoint has (patience.py)."""

REPLICA_CPUS = 1.0
INGRESS_CPUS = 0.5
SERVE_CPUS = 2.0
"""Logical CPUs, for Ray's book-keeping alone: they limit nothing."""


RACK_INGRESSES = 2
"""Of an endpoint on a rack, where nothing else is said: when one is lost, the other's streams go on."""
MOST_INGRESSES = 64

_ORIGIN = re.compile(r"\*|https?://[^/\s*]+")
"""RFC 6454: scheme, host and port, as browsers send them."""

STEP_TOKENS, STEP_REQUESTS = 2048, 256
"""Tokens of one step, and requests in it, where the user says nothing. vLLM's own defaults vary with the machine and
the number of stages (up to 16,384 and 1,024), and placement has to know them before there is an engine."""


@dataclass(frozen=True)
class Scaling:
    """How many engines a model has where that follows its load.

    Attributes:
        minimum, maximum: engines; a minimum of 0 lets Macs sleep.
        load: requests at once that one is meant to take. keep_s: how long one is kept after it was last needed.
    """

    minimum: int
    maximum: int
    load: float = LOAD
    keep_s: float = KEEP_S

    @classmethod
    def of(cls, entry: ReplicasEntry) -> "Scaling":
        """As a rack file says it."""
        return cls(entry.min, entry.max, entry.load, entry.keep)


@dataclass(frozen=True)
class OnDemandPlan:
    """Models are loaded when they are asked for, and leave when memory is short or nobody asks.

    Attributes:
        keep_s: how long one stays that nobody asks. pins: names of models that are loaded at the start and stay.
        memory: bytes for models; None: what is free at the start. sizes: bytes that each takes; known once the models
            are (replica/model_need.py).
    """

    keep_s: float = KEEP_S
    pins: frozenset[str] = frozenset()
    memory: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Queue:
    """What may wait for a model's engines; None follows from what they tell (endpoint/turns.py).

    Attributes:
        requests, tokens: of prompts, that may be ahead of a request that waits. wait_s: that it may have to wait.
        timeout_s: for an answer, where the request does not say how long; None: without end.
    """

    requests: int | None = None
    tokens: int | None = None
    wait_s: float | None = None
    timeout_s: float | None = None


QUEUE = Queue()
"""Where nothing else is said."""


@dataclass(frozen=True)
class ModelPlan:
    """One model behind the endpoint.

    Attributes:
        name: what requests call it (`model` in the body).
        source: what the user named: a folder, a GGUF file or an id; None is the embedded model.
        engine_args: vLLM AsyncEngineArgs and FrontendArgs fields that the user set; the others keep vLLM's defaults,
            but for STEP_TOKENS and STEP_REQUESTS.
        replicas: how many engines serve it, at first. scaling: how that changes; None: it does not.
        stages: Macs of one replica; None takes what placement finds best when the replica starts.
        share_macs: stages of one replica may share a Mac.
        streams: requests at once that a replica is planned for; None: as many as fit.
        network: between the Macs; None where nothing is known of it.
        on_demand: it is loaded when it is asked for. optional: the others are served also if it is faulty.
        queue: for its engines.
    """

    name: str
    source: str | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 1
    stages: int | None = 1
    share_macs: bool = False
    streams: int | None = None
    network: Network | None = None
    scaling: Scaling | None = None
    on_demand: bool = False
    optional: bool = False
    queue: Queue = QUEUE

    def scaled(self, scaling: Scaling) -> "ModelPlan":
        """This plan with so many engines, which need no scaling if the span is one number."""
        varies = scaling.minimum < scaling.maximum
        return replace(self, replicas=scaling.minimum, scaling=scaling if varies else None)

    @property
    def sleeps(self) -> bool:
        """It may be without an engine for that nobody asks it anything."""
        return self.on_demand or (self.scaling is not None and self.scaling.minimum == 0)

    @property
    def places(self) -> int:
        """For how many engines there has to be room from the start, on demand for the one that may come."""
        return 1 if self.on_demand else self.replicas

    @property
    def step_tokens(self) -> int:
        """Tokens of one step at most."""
        return int(self.engine_args.get("max_num_batched_tokens") or STEP_TOKENS)

    @property
    def step_requests(self) -> int:
        """Requests in one step at most."""
        return int(self.engine_args.get("max_num_seqs") or STEP_REQUESTS)


@dataclass(frozen=True)
class Limits:
    """What is done for a request whose engine is lost while it answers.

    Attributes:
        times: it may lose so many; 0: it ends with its engine. wait_s: for another one, each time.
    """

    times: int = 5
    wait_s: float = 120.0


LIMITS = Limits()
"""Where nothing else is said."""


@dataclass(frozen=True)
class ServePlan:
    """The whole endpoint.

    Attributes:
        host, port: where it listens. api_keys: empty means that everybody may ask.
        ingresses: processes that take its requests, all on the head's machine and behind one port.
        origins: of pages that browsers may let use it, such as https://chat.example, or * for all.
        on_demand: how models come and go; None: they do not.
        limits: of requests whose engine is lost.
    """

    models: tuple[ModelPlan, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: frozenset[str] = frozenset()
    ingresses: int = 1
    origins: tuple[str, ...] = ()
    on_demand: OnDemandPlan | None = None
    limits: Limits = LIMITS

    def __post_init__(self) -> None:
        if not self.models:
            raise SettingsError("No model to serve: name at least one.")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise SettingsError(
                    f"--allow-origin {origin} is no origin: write it as https://chat.example or http://localhost:3000, "
                    "without a path, or * for all."
                )
        if not 1 <= self.ingresses <= MOST_INGRESSES:
            raise SettingsError(f"--ingresses {self.ingresses} is not a number from 1 to {MOST_INGRESSES}.")
        if self.limits.times < 0:
            raise SettingsError(f"--failovers {self.limits.times} is less than none.")
        for model in self.models:
            ray_names.check(model.name)
        for name, count in Counter(m.name for m in self.models).items():
            if count > 1:
                raise SettingsError(f"Two models are called {name!r}: give each a name of its own with --served-name.")

    @property
    def url(self) -> str:
        """Base URL for clients on this machine."""
        return http_url({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host), self.port)

    def workers(self) -> int:
        """How many `mlx` resources the plan takes at least."""
        return sum(m.places * (m.stages or 1) for m in self.models)

    def cpus(self) -> float:
        """Logical CPUs that a Ray of our own must offer for all actors to be placed."""
        return sum(m.places for m in self.models) * REPLICA_CPUS + self.ingresses * INGRESS_CPUS + SERVE_CPUS


@dataclass(frozen=True)
class Batches:
    """Where the endpoint keeps files and batches, and how they reach its engines.

    Attributes:
        folder: on the head's machine. url: of the endpoint, as seen from there.
    """

    folder: str
    url: str


def served_names(models: Sequence[str], given: Sequence[str]) -> tuple[str, ...]:
    """The name of each model: the given ones, else the last part of a path as it was typed, or the id as it is.

    Raises:
        SettingsError: names are given, but not one for each model, or a name is no text that JSON could carry.
    """
    if given and len(given) != len(models):
        raise SettingsError(
            f"--served-name was given {len(given)} times for {len(models)} models: give one each or none."
        )
    names = tuple(given) if given else tuple(_own_name(m) for m in models)
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise SettingsError(f"{name!r} is not UTF-8: give the model a name of text with --served-name.") from None
    return names


def _own_name(model: str) -> str:
    """Links are not followed: those of a hub's cache lead to files that are called by their hash."""
    path = user_path(model)
    if not (model.startswith(("/", ".", "~")) or os.path.exists(path)):
        return model
    path = Path(os.path.abspath(path))
    name = path.stem if path.suffix.lower() == ".gguf" and not os.path.isdir(path) else path.name
    return name or model
