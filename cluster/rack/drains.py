"""Macs that are to be let go, one by one: told by `pomarium rack drain`, kept by Ray's head.

    cli/rack_drain.py --tell--> Ray's internal key-value store --read_all--> Drains
        engines that run there (replica/departure.py) end, who places others (executor/team.py) leaves the Mac out,
        `rack status` shows it, its agent does not join again <----'

A drain is of one node of Ray's, not of a Mac: one that joins again has another node, and is drained no more. A process
of Ray's can call these at once; any other calls `reports.use` before.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from ray.experimental import internal_kv

from pomarium.cluster.rack.reports import NAMESPACE

PREFIX = b"drain:"


@dataclass(frozen=True)
class Drain:
    """Attributes:
    mac: its name. node: Ray's id of its node, hex.
    until: answers that run there may go on until then, Unix seconds; 0: another engine goes on with them at once.
    spared: engines, by replica, that stay for now: others are to be there before they go.
    """

    mac: str
    node: str
    until: float = 0.0
    spared: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """A clause for who is told that an engine ends."""
        return f"{self.mac} is being drained"


def tell(drain: Drain) -> None:
    """In place of what was told of the Mac before."""
    internal_kv._internal_kv_put(PREFIX + drain.mac.encode(), encode(drain), namespace=NAMESPACE)


def withdraw(mac: str) -> None:
    """The Mac is to be let go no more."""
    internal_kv._internal_kv_del(PREFIX + mac.encode(), namespace=NAMESPACE)


def read(mac: str) -> Drain | None:
    """What was told of one Mac last, if anything."""
    text = internal_kv._internal_kv_get(PREFIX + mac.encode(), namespace=NAMESPACE)
    return None if text is None else decode(text)


def read_all() -> tuple[Drain, ...]:
    """All, by name; of Macs that joined again, too, whose nodes are others by now."""
    keys = internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE)
    found = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return tuple(sorted((decode(text) for text in found if text is not None), key=lambda drain: drain.mac))


def of_nodes(drains: Iterable[Drain], nodes: Iterable[str]) -> Drain | None:
    """The first of `drains` that concerns one of `nodes`, the most urgent one before others."""
    known = frozenset(nodes)
    return min((drain for drain in drains if drain.node in known), key=lambda drain: drain.until, default=None)


def encode(drain: Drain) -> bytes:
    """JSON."""
    return json.dumps(asdict(drain)).encode()


def decode(text: bytes) -> Drain:
    """The inverse of `encode`. Raises ValueError, TypeError or KeyError for other text."""
    data = json.loads(text)
    return Drain(**{**data, "spared": tuple(data["spared"])})
