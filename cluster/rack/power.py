"""Which Macs of the rack sleep, wake or are set aside: told by whoever wakes them, kept by Ray's head.

    autoscaling.keeper --publish, every few seconds--> Ray's internal key-value store --read_all--> MacPowers
                                       who places engines, `rack status`, /metrics, agents <----'

A rack without autoscaling has none of these; what the autoscaler of a dead head wrote is forgotten when it gets old. A
process of Ray's can call these at once; any other calls `reports.use` before.
"""

import time
from collections.abc import Iterable

from ray.experimental import internal_kv

from pomarium.cluster.rack.mac_power import MacPower, decode, encode, fresh
from pomarium.cluster.rack.reports import NAMESPACE

PREFIX = b"mac:"


def publish(macs: Iterable[MacPower]) -> None:
    """Tell it, in place of what was told of these Macs before."""
    for mac in macs:
        internal_kv._internal_kv_put(PREFIX + mac.name.encode(), encode(mac), namespace=NAMESPACE)


def read_all() -> tuple[MacPower, ...]:
    """All that is fresh, by name; empty for a rack that wakes and puts to sleep nobody."""
    keys = internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE)
    found = [internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys]
    return fresh((decode(text) for text in found if text is not None), time.time())


def read(name: str) -> MacPower | None:
    """What is told of one Mac; None: nothing that is fresh."""
    text = internal_kv._internal_kv_get(PREFIX + name.encode(), namespace=NAMESPACE)
    return None if text is None else next(iter(fresh([decode(text)], time.time())), None)
