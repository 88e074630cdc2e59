"""Which requests an endpoint's engines were sent: by this ingress and, as far as they tell it, by the others.

    prefix_router.py --write--> Ledger --Entry: tell--> siblings.py --> the others
    the others --> siblings.py --hear--> Ledger --load, matched, held--> prefix_router.py

With several ingresses a conversation's next turn may reach another one than the last; it has to find the same engine.
"""

import functools
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pomarium.cluster.endpoint.routing import PrefixTable

OWN = ""
"""Who tells what this ingress writes itself."""


class What(Enum):
    """What an entry says of a replica: it was sent a request; one of its requests is over; it has read a prompt."""

    SENT = "sent"
    OVER = "over"
    READ = "read"


@dataclass(frozen=True)
class Entry:
    """An entry. keys: of the prompt that was read."""

    what: What
    deployment: str
    replica: str
    keys: tuple[int, ...] = ()

    @classmethod
    def of(cls, fields: Sequence[Any]) -> "Entry":
        """The entry whose `fields` these are. Raises ValueError or TypeError if they are none's."""
        what, deployment, replica, keys = fields
        return cls(What(what), str(deployment), str(replica), tuple(int(key) for key in keys))

    @property
    def fields(self) -> tuple[str, str, str, tuple[int, ...]]:
        """As JSON has them."""
        return self.what.value, self.deployment, self.replica, self.keys


class Ledger:
    """The ledger. Routers write and ask in a thread of Serve's, siblings tell in another.

    Attributes:
        tell: called with each entry that this ingress writes, and its number.
    """

    def __init__(self) -> None:
        self.tell: Callable[[Entry, int], None] = lambda entry, number: None
        self._written = 0
        self._lock = threading.Lock()
        self._tables: dict[str, PrefixTable[str]] = defaultdict(PrefixTable)
        self._running: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)

    def write(self, entry: Entry) -> None:
        """This ingress has done that."""
        with self._lock:
            self._written += 1
            number = self._written
            self._take(OWN, entry)
        self.tell(entry, number)

    def hear(self, teller: str, entry: Entry) -> None:
        """`teller` has done that."""
        with self._lock:
            self._take(teller, entry)

    def _take(self, teller: str, entry: Entry) -> None:
        if entry.what is What.READ:
            self._tables[entry.deployment].learn(entry.replica, entry.keys)
            return
        running, name = self._running[teller], (entry.deployment, entry.replica)
        running[name] = max(0, running[name] + (1 if entry.what is What.SENT else -1))

    def gone(self, teller: str) -> None:
        """`teller` has ended, and with it what it had asked."""
        with self._lock:
            self._running.pop(teller, None)

    def load(self, deployment: str, replica: str) -> int:
        """Requests that were sent to `replica` and are not over."""
        with self._lock:
            return sum(running[deployment, replica] for running in self._running.values())

    def matched(self, deployment: str, replica: str, keys: Sequence[int]) -> int:
        """How many leading ones of `keys` it has read."""
        with self._lock:
            return self._tables[deployment].matched(replica, keys)

    def held(self, deployment: str, replica: str) -> int:
        """How many keys it is believed to hold."""
        with self._lock:
            return self._tables[deployment].held(replica)

    def keep(self, deployment: str, replicas: Collection[str]) -> None:
        """Of `deployment` there are these and no others."""
        with self._lock:
            self._tables[deployment].keep(replicas)
            for running in self._running.values():
                for name in [name for name in running if name[0] == deployment and name[1] not in replicas]:
                    del running[name]

    def snapshot(self) -> tuple[list[Entry], int]:
        """What somebody new has to know, this ingress's own requests and all prompts; and the number of the last entry
        in it."""
        with self._lock:
            own = [Entry(What.SENT, *name) for name, count in self._running[OWN].items() for _ in range(count)]
            read = [
                Entry(What.READ, deployment, replica, keys)
                for deployment, table in self._tables.items()
                for replica, keys in table.all()
            ]
            return own + read, self._written


@functools.cache
def of_this_process() -> Ledger:
    """The ingress's. Serve makes the routers, and hands them nothing of the ingress's own."""
    return Ledger()
