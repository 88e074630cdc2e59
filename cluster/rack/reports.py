"""What replicas tell about themselves, for `pomarium rack status`: kept by Ray's head, forgotten when they fall silent.

    replica --publish, every few seconds--> Ray's internal key-value store --read_all--> ReplicaReports

A process of Ray's (driver, actor) can call these at once; any other calls `use` before.
"""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.experimental import internal_kv

NAMESPACE = b"pomarium"
PREFIX = b"replica:"
FRESH_S = 15.0
"""A report that is older is of a replica that is gone."""


@dataclass(frozen=True)
class StageReport:
    """A stage: its Mac, its half-open range of layers, its process. memory: bytes that it holds."""

    mac: str
    first: int
    end: int
    pid: int
    memory: int


@dataclass(frozen=True)
class ReplicaReport:
    """One engine.

    Attributes:
        model: as requests call it. replica: unique. layers: of the model.
        tokens_per_s: generated of late. running, waiting: requests.
        written: Unix time in seconds, by the clock of the replica's machine.
    """

    model: str
    replica: str
    layers: int
    stages: tuple[StageReport, ...]
    tokens_per_s: float
    running: int
    waiting: int
    written: float


def use(client: GcsClient) -> None:
    """Let this process, which has no Ray of its own, read and write through `client`."""
    internal_kv._initialize_internal_kv(client)


def publish(report: ReplicaReport) -> None:
    """Tell it, in place of the replica's last report."""
    internal_kv._internal_kv_put(_key(report.replica), encode(report), namespace=NAMESPACE)


def withdraw(replica: str) -> None:
    """The replica is gone."""
    internal_kv._internal_kv_del(_key(replica), namespace=NAMESPACE)


def read_all() -> tuple[ReplicaReport, ...]:
    """Fresh reports, by model and replica."""
    found = []
    for key in internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE):
        text = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
        if text is not None:  # withdrawn meanwhile
            found.append(decode(text))
    return fresh(found, time.time())


def fresh(reports: "list[ReplicaReport]", now: float) -> tuple[ReplicaReport, ...]:
    """Those not older than FRESH_S at Unix time `now`, by model and replica."""
    kept = [report for report in reports if now - report.written <= FRESH_S]
    return tuple(sorted(kept, key=lambda report: (report.model, report.replica)))


def encode(report: ReplicaReport) -> bytes:
    """JSON."""
    return json.dumps(asdict(report)).encode()


def decode(text: bytes) -> ReplicaReport:
    """The inverse of `encode`. Raises ValueError or TypeError for other text."""
    data: dict[str, Any] = json.loads(text)
    return ReplicaReport(**{**data, "stages": tuple(StageReport(**stage) for stage in data["stages"])})


def _key(replica: str) -> bytes:
    return PREFIX + replica.encode()
