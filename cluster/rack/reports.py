"""What replicas tell about themselves: kept by Ray's head, forgotten when they fall silent.

    replica that serves --publish, every few seconds--> Ray's internal --read_all--> ReplicaReports
    replica that waits for Macs --publish_waiting-----> key-value store --read_waiting--> WaitingReports
    replica whose engine dies --publish_loss----------'                 '--read_losses--> LossReports, one per model

A process of Ray's (driver, actor) can call these at once; any other calls `use` before.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.experimental import internal_kv

NAMESPACE = b"pomarium"
PREFIX = b"replica:"
WAITING_PREFIX = b"waiting:"
LOSS_PREFIX = b"loss:"
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
class LinkReport:
    """Over which a stage hands on to the next: names of both Macs. bandwidth: bytes/s. latency: seconds, one way; both
    as rack.yaml has them, None where none was given."""

    here: str
    there: str
    bandwidth: float | None
    latency: float | None


@dataclass(frozen=True)
class ReplicaReport:
    """One engine.

    Attributes:
        model: as requests call it. replica: unique. layers: of the model.
        links: between stages on different Macs, in their order.
        tokens_per_s: generated of late. running, waiting: requests.
        requests_per_min: answered in the last minute.
        kv_use: share of its KV cache that requests hold, 0 to 1.
        cached_share: of the prompts' tokens, what its cache knew, over the last thousand requests; 0 to 1.
        written: Unix time in seconds, by the clock of the replica's machine.
        least_macs: that it needs, however they are chosen.
    """

    model: str
    replica: str
    layers: int
    stages: tuple[StageReport, ...]
    links: tuple[LinkReport, ...]
    tokens_per_s: float
    running: int
    waiting: int
    requests_per_min: float
    kv_use: float
    cached_share: float
    written: float
    least_macs: int = 1


@dataclass(frozen=True)
class WaitingReport:
    """A replica that cannot be placed now.

    Attributes:
        model, replica, written: as of a ReplicaReport. reason: what is missing, one sentence.
        waking: Macs are being woken for it.
    """

    model: str
    replica: str
    reason: str
    written: float
    waking: bool = False


@dataclass(frozen=True)
class LossReport:
    """An engine that died. model, replica, written: as of a ReplicaReport. reason: a clause that tells of what."""

    model: str
    replica: str
    reason: str
    written: float


Report = TypeVar("Report", ReplicaReport, WaitingReport)


def use(client: GcsClient) -> None:
    """Let this process, which has no Ray of its own, read and write through `client`."""
    internal_kv._initialize_internal_kv(client)


def publish(report: ReplicaReport) -> None:
    """Tell it, in place of the replica's last report."""
    _put(PREFIX, report.replica, report)


def publish_waiting(report: WaitingReport) -> None:
    """Tell it, in place of the replica's last report of this kind."""
    _put(WAITING_PREFIX, report.replica, report)


def publish_loss(report: LossReport) -> None:
    """Tell it, in place of the model's last loss."""
    _put(LOSS_PREFIX, report.model, report)


def withdraw(replica: str) -> None:
    """The replica serves no more."""
    _delete(PREFIX, replica)


def withdraw_waiting(replica: str) -> None:
    """The replica waits no more."""
    _delete(WAITING_PREFIX, replica)


def read_all() -> tuple[ReplicaReport, ...]:
    """Fresh reports, by model and replica."""
    return fresh([decode(text) for text in _texts(PREFIX)], time.time())


def read_waiting() -> tuple[WaitingReport, ...]:
    """Fresh reports, by model and replica."""
    return fresh([decode_waiting(text) for text in _texts(WAITING_PREFIX)], time.time())


def read_losses() -> tuple[LossReport, ...]:
    """The last loss of each model, however long ago, by model."""
    return tuple(sorted((decode_loss(text) for text in _texts(LOSS_PREFIX)), key=lambda report: report.model))


def fresh(reports: Sequence[Report], now: float) -> tuple[Report, ...]:
    """Those not older than FRESH_S at Unix time `now`, by model and replica."""
    kept = [report for report in reports if now - report.written <= FRESH_S]
    return tuple(sorted(kept, key=lambda report: (report.model, report.replica)))


def encode(report: ReplicaReport | WaitingReport | LossReport) -> bytes:
    """JSON."""
    return json.dumps(asdict(report)).encode()


def decode(text: bytes) -> ReplicaReport:
    """The inverse of `encode`. Raises ValueError or TypeError for other text."""
    data: dict[str, Any] = json.loads(text)
    stages = tuple(StageReport(**stage) for stage in data["stages"])
    links = tuple(LinkReport(**link) for link in data["links"])
    return ReplicaReport(**{**data, "stages": stages, "links": links})


def decode_waiting(text: bytes) -> WaitingReport:
    """The inverse of `encode`. Raises ValueError or TypeError for other text."""
    return WaitingReport(**json.loads(text))


def decode_loss(text: bytes) -> LossReport:
    """The inverse of `encode`. Raises ValueError or TypeError for other text."""
    return LossReport(**json.loads(text))


def _put(prefix: bytes, key: str, report: ReplicaReport | WaitingReport | LossReport) -> None:
    internal_kv._internal_kv_put(prefix + key.encode(), encode(report), namespace=NAMESPACE)


def _delete(prefix: bytes, replica: str) -> None:
    internal_kv._internal_kv_del(prefix + replica.encode(), namespace=NAMESPACE)


def _texts(prefix: bytes) -> list[bytes]:
    keys = internal_kv._internal_kv_list(prefix, namespace=NAMESPACE)
    found = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return [text for text in found if text is not None]  # None: withdrawn meanwhile
