"""Which Macs of the rack sleep, wake or are set aside: told by whoever wakes them, kept by Ray's head.

    autoscaling.keeper --publish, every few seconds--> Ray's internal key-value store --read_all--> MacPowers
                                       who places engines, `rack status`, /metrics, agents <----'

A rack without autoscaling has none of these; what the autoscaler of a dead head wrote is forgotten when it gets old. A
process of Ray's can call these at once; any other calls `reports.use` before.
"""

import time
from collections.abc import Iterable

from ray.experimental import internal_kv

from pomarium.cluster.rack.mac_power import MacPower, decode, encode, fresh, instance_for
from pomarium.cluster.rack.reports import NAMESPACE
from pomarium.cluster.rack.roster import Member
from pomarium.worker.errors import SettingsError

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
    """What was told of one Mac, however long ago; its own clock may be wrong. None: nothing since the head's start."""
    text = internal_kv._internal_kv_get(PREFIX + name.encode(), namespace=NAMESPACE)
    return None if text is None else decode(text)


def instance_of(name: str, members: Iterable[Member]) -> str | None:
    """What a node of the Mac that joins now is to be called; "" in a rack where no Mac sleeps.

    None: the head, or its autoscaler, is not up yet. A Mac that joined before would be one that it does not know, and
    so never sleep.

    Raises:
        SettingsError: Macs sleep in this rack and rack.yaml does not name this one.
    """
    head = next((member for member in members if member.head and member.alive), None)
    if head is None:
        return None
    if not head.autoscaler:
        return ""
    if (told := read(name)) is not None:
        return instance_for(name, told)
    if internal_kv._internal_kv_list(PREFIX, namespace=NAMESPACE):
        raise SettingsError(
            f"Macs sleep in this rack, and its rack.yaml does not name {name}: add it to that file on the head, and "
            "start the rack anew, or give the --name that it has there."
        )
    return None
