"""Which requests an endpoint's engines were sent: by this ingress and, as far as they tell it, by the others.

    prefix_router.py, dispatch.py --write--> Ledger --Entry: tell--> siblings.py --> the others
    the others --> siblings.py --hear--> Ledger --candidates--> prefix_router.py, dispatch.py

With several ingresses a conversation's next turn may reach another one than the last; it has to find the same engine.
"""

import functools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pomarium.cluster.endpoint.routing import Candidate, PrefixTable
from pomarium.cluster.endpoint.turns import Supply
from pomarium.cluster.http.room import Room
from pomarium.cluster.replica.slots import FIRST

OWN = ""
"""Who tells what this ingress writes itself."""

SILENT_S = 1.5
"""A replica that takes longer than this to take a request gets no more while others answer."""

SILENT_NO_MORE_S = 10.0
"""After this it is tried again."""


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

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock`: seconds."""
        self._clock = clock
        self.tell: Callable[[Entry, int], None] = lambda entry, number: None
        self._written = 0
        self._lock = threading.Lock()
        self._tables: dict[str, PrefixTable[str]] = defaultdict(PrefixTable)
        self._running: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._replicas: dict[str, frozenset[str]] = {}
        self._unanswered: dict[tuple[str, str], float] = {}
        self._rooms: dict[str, Room] = {}

    def write(self, entry: Entry) -> None:
        """This ingress has done that."""
        with self._lock:
            self._written += 1
            number = self._written
            self._take(OWN, entry)
            if entry.what is What.SENT:
                self._unanswered.setdefault((entry.deployment, entry.replica), self._clock())
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

    def answered(self, deployment: str, replica: str) -> None:
        """`replica` has given a sign: it has taken a request of this ingress, or refused one."""
        with self._lock:
            self._unanswered.pop((deployment, replica), None)

    def withdrawn(self, deployment: str, replica: str) -> None:
        """A request that `replica` had not taken is not asked any more. That says nothing of it, unless it had time."""
        with self._lock:
            if self._unanswered_s((deployment, replica)) <= SILENT_S:
                self._unanswered.pop((deployment, replica), None)

    def lost(self, replica: str) -> None:
        """The engine of `replica` is dead. Its process refuses what comes until it ends, and has the least to do."""
        with self._lock:
            for deployment in [name for name, replicas in self._replicas.items() if replica in replicas]:
                self._unanswered[deployment, replica] = self._clock() - 2 * SILENT_S  # as if silent

    def told(self, replica: str, room: Room) -> None:
        """`replica` has said what it has room for."""
        with self._lock:
            if any(replica in running for running in self._replicas.values()):
                self._rooms[replica] = room

    def supply(self, deployment: str) -> Supply | None:
        """What the replicas that run have room for together, and what others use of it; None: none runs."""
        with self._lock:
            replicas = self._replicas.get(deployment, frozenset())
            if not replicas:
                return None
            known = [self._rooms[replica] for replica in replicas if replica in self._rooms]
            slots = sum(room.slots for room in known) + FIRST * (len(replicas) - len(known))
            theirs = [
                sum(count for (name, replica), count in running.items() if name == deployment and replica in replicas)
                for teller, running in self._running.items()
                if teller != OWN
            ]
        tokens = sum(room.tokens for room in known) if len(known) == len(replicas) else 0
        return Supply(slots, tokens or None, sum(theirs), sum(count > 0 for count in theirs))

    def replicas(self, deployment: str) -> frozenset[str]:
        """Those that run, as Serve told the router; none before it did."""
        with self._lock:
            return self._replicas.get(deployment, frozenset())

    def unanswered_s(self, deployment: str, replica: str) -> float:
        """For how long `replica` has not taken a request of this ingress; 0 if it has taken all."""
        with self._lock:
            return self._unanswered_s((deployment, replica))

    def _unanswered_s(self, name: tuple[str, str]) -> float:
        now = self._clock()
        return now - self._unanswered.get(name, now)

    def candidates(self, deployment: str, replicas: Collection[str], keys: Sequence[int]) -> list[Candidate[str]]:
        """What is known of `replicas`, for a prompt with `keys`."""
        with self._lock:
            return [self._candidate(deployment, replica, keys) for replica in replicas]

    def _candidate(self, deployment: str, replica: str, keys: Sequence[int]) -> Candidate[str]:
        name, table = (deployment, replica), self._tables[deployment]
        return Candidate(
            replica,
            load=sum(running[name] for running in self._running.values()),
            matched=table.matched(replica, keys),
            held=table.held(replica),
            silent=SILENT_S < self._unanswered_s(name) <= SILENT_NO_MORE_S,
        )

    def keep(self, deployment: str, replicas: Collection[str]) -> None:
        """Of `deployment` there are these and no others."""
        with self._lock:
            for gone in self._replicas.get(deployment, frozenset()) - frozenset(replicas):
                self._rooms.pop(gone, None)
            self._replicas[deployment] = frozenset(replicas)
            self._tables[deployment].keep(replicas)
            for name in [name for name in self._unanswered if name[0] == deployment and name[1] not in replicas]:
                del self._unanswered[name]
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
