"""What a Mac of rack.yaml that sleeps and wakes does, as facts. Pure; kept by Ray's head through power_states.py.

An *instance* is one time that a Mac is awake: Ray's autoscaler knows a node by it and wants a new one at each wake.
"""

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from typing import Any

FRESH_S = 20.0
"""What is older was written by an autoscaler that is gone: nobody would wake the Mac."""


class Power(StrEnum):
    """What a Mac of rack.yaml does."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    WAKING = "waking"
    RETIRING = "going to sleep"
    SET_ASIDE = "set aside"


@dataclass(frozen=True)
class MacPower:
    """One Mac.

    Attributes:
        name: as in rack.yaml. address: as in rack.yaml.
        state: now. since: when it came to it, Unix seconds.
        not_before: it is not woken before this time, Unix seconds; 0 for at once.
        reason: why it is not woken, or why the last wake failed; "" if there is nothing to say.
        instance: what its node is to be called while it wakes or is awake (RAY_CLOUD_INSTANCE_ID); "" while it sleeps.
        wakes, failures: how often it was woken, and how often in a row that failed of late.
        labels: that its node has when it runs (rack.labels): a plan can count on it before it is awake.
        written: Unix seconds.
    """

    name: str
    address: str
    state: Power
    since: float
    not_before: float = 0.0
    instance: str = ""
    reason: str = ""
    wakes: int = 0
    failures: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    written: float = 0.0

    def wakeable(self, now: float) -> bool:
        """Whether somebody who needs it would get it: it sleeps and may be woken, or wakes already."""
        return self.state is Power.WAKING or (self.state in (Power.ASLEEP, Power.RETIRING) and self.not_before <= now)


LOST = "lost"
"""Of a Mac whose node is away and that nobody says to be asleep."""


def without_node(told: Power | None) -> str:
    """What a Mac does that has no live node. `told`: by the autoscaler; None: nothing."""
    return LOST if told in (None, Power.AWAKE) else str(told)


def new_instance(name: str) -> str:
    """Of the Mac, or head, called so: a name that was never used before."""
    return f"{name}.{secrets.token_hex(4)}"


def mac_of(instance: str) -> str:
    """The inverse of `new_instance`."""
    return instance.rpartition(".")[0]


def instance_for(name: str, told: MacPower) -> str:
    """What a node that starts now is called: as it was asked for, else anew."""
    return told.instance if told.state is Power.WAKING else new_instance(name)


def fresh(macs: Iterable[MacPower], now: float) -> tuple[MacPower, ...]:
    """Those not older than FRESH_S at Unix time `now`, by name."""
    return tuple(sorted((mac for mac in macs if now - mac.written <= FRESH_S), key=lambda mac: mac.name))


def encode(mac: MacPower) -> bytes:
    """JSON."""
    return json.dumps(asdict(mac)).encode()


def decode(text: bytes) -> MacPower:
    """The inverse of `encode`; fields of another version are dropped.

    Raises ValueError, TypeError or KeyError for other text.
    """
    data: dict[str, Any] = json.loads(text)
    known = {field.name: data[field.name] for field in fields(MacPower) if field.name in data}
    return MacPower(**{**known, "state": Power(data["state"])})
