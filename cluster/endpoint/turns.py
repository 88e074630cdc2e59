"""Who waits for an engine, in which order they go, and who is refused: pure decisions.

    Turns: a line for each client; add, pop: the clients take turns, each with its oldest request
    Turns.ahead(client): what goes before its next request --Bounds, Pace: refusal--> None: it waits; seconds: 429

A bound holds for what is ahead of a request, not for all that waits: where one client has filled the queue, another
still has its turn. So N clients that all ask for more than they get hold 1 + 1/2 + ... + 1/N times what one could. No
request is refused for its own size.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Generic, TypeVar

from pomarium.cluster.replica.serve_plan import Queue

T = TypeVar("T", bound=Hashable)

BURST_S = 10.0
"""How long who comes in a burst may have to wait for an engine, or as long as an answer takes, if that is longer."""

GRACE_S = 1.0
"""A queue that is not empty for longer than this is no burst's, and is kept short."""

CALM_S = 5.0
"""It is a burst again only once nothing has waited for so long."""

SHORTEST_S = 0.05
LONGEST_RETRY_S = 60

LEAST_WAITING, SLOTFULS = 256, 4
"""Requests that may wait where nothing is said, at least, and for each slot."""


@dataclass(frozen=True)
class Supply:
    """What the engines of a model have room for.

    Attributes:
        slots: requests at once. tokens: of their KV caches; None: not known yet.
        elsewhere: requests that other ingresses have sent. rivals: ingresses that have.
    """

    slots: int
    tokens: int | None = None
    elsewhere: int = 0
    rivals: int = 0

    @property
    def share(self) -> int:
        """Slots that this ingress may use whatever the others do."""
        return max(1, self.slots // (1 + self.rivals))


@dataclass(frozen=True)
class Held:
    """Requests that this ingress has sent to the engines: of people, and of batches."""

    people: int
    batches: int

    @property
    def all(self) -> int:
        """Together."""
        return self.people + self.batches


@dataclass(frozen=True)
class Ahead:
    """What goes before a request: requests, and tokens of their prompts."""

    requests: int
    tokens: int


@dataclass(frozen=True)
class Pace:
    """How fast the engines are.

    Attributes:
        per_s: requests that end; None: nothing is known. answer_s: for which one runs. first_s: until its first token.
        bursts: what waits has not waited for long.
        ends: seconds after which those that run may end, if they take as long as others did, the soonest first.
    """

    per_s: float | None
    answer_s: float
    first_s: float
    bursts: bool
    ends: Sequence[float] = ()

    def wait_s(self, ahead: int) -> float:
        """Seconds until a slot is free for one with so many ahead of it. Those that began together end together, and
        nothing does in between."""
        if self.per_s is None:
            return 0.0
        together = self.ends[min(ahead, len(self.ends) - 1)] if self.ends else 0.0
        return max((ahead + 1) / self.per_s, together)


def may_go(held: Held, supply: Supply) -> bool:
    """Whether a person's request goes to an engine now. Batches leave half of what an ingress has."""
    if held.all + supply.elsewhere < supply.slots or held.all < supply.share:
        return True
    return held.people < max(1, supply.share // 2)


def batch_may_go(held: Held, supply: Supply, people: bool) -> bool:
    """Whether a batch's request does, where no person's waits. `people`: some have asked of late."""
    if held.all + supply.elsewhere >= supply.slots:
        return False
    return not people or held.batches < max(1, supply.share // 2)


def refusal(ahead: Ahead, queue: Queue, supply: Supply, pace: Pace) -> int | None:
    """Seconds after which a request may be tried again; None: it may wait.

    Args:
        ahead: of it. What is there beyond the slots counts, too.
    """
    requests = max(LEAST_WAITING, SLOTFULS * supply.slots) if queue.requests is None else queue.requests
    tokens = supply.tokens if queue.tokens is None else queue.tokens
    wait_s = pace.wait_s(ahead.requests)
    allowed_s = allowed(queue, pace)
    if ahead.requests >= requests or (tokens is not None and ahead.requests and ahead.tokens >= tokens):
        return _retry(wait_s)
    if wait_s > allowed_s and (ahead.requests or not pace.bursts):
        return _retry(wait_s - allowed_s)
    return None


def allowed(queue: Queue, pace: Pace) -> float:
    """Seconds that a request may have to wait for an engine."""
    if queue.wait_s is not None:
        return queue.wait_s
    return max(BURST_S, pace.answer_s) if pace.bursts else max(SHORTEST_S, pace.first_s)


def _retry(seconds: float) -> int:
    return max(1, min(LONGEST_RETRY_S, math.ceil(seconds)))


class Turns(Generic[T]):
    """Requests that wait, by their clients."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, deque[tuple[T, int]]] = OrderedDict()
        self.tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        return iter([request for line in self._lines.values() for request, _ in line])

    def ahead(self, client: Hashable) -> Ahead:
        """What would go before one more request of `client`, if nobody else came."""
        own, requests, tokens = len(self._lines.get(client, ())), 0, 0
        turns = own + 1  # of those whose turn comes before the client's; of the others one less
        for name, line in self._lines.items():
            turns = own if name == client else turns
            counted = [size for _, size in islice(line, turns)]
            requests, tokens = requests + len(counted), tokens + sum(counted)
        return Ahead(requests, tokens)

    def add(self, client: Hashable, request: T, tokens: int) -> None:
        """`request` of `client` waits, with so many tokens."""
        self._lines.setdefault(client, deque()).append((request, tokens))
        self.tokens += tokens

    def pop(self) -> T | None:
        """Whose turn it is, who waits no more; None if nobody does."""
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        request, tokens = line.popleft()
        self.tokens -= tokens
        if line:
            self._lines.move_to_end(client)
        else:
            del self._lines[client]
        return request

    def drop(self, client: Hashable, request: T) -> bool:
        """`request` of `client` waits no more; whether it did."""
        line = self._lines.get(client, deque())
        found = next((entry for entry in line if entry[0] == request), None)
        if found is None:
            return False
        line.remove(found)
        self.tokens -= found[1]
        if not line:
            del self._lines[client]
        return True


class Standing:
    """Whether what waits came in a burst, or stands there because more is asked than the engines can do."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._stands = False
        self._last = -math.inf

    def look(self, now: float, waiting: bool) -> bool:
        """Whether it came in a burst. now: seconds. waiting: whether anything does."""
        if self._stands and now - self._last > CALM_S:
            self._stands = False
        if waiting:
            self._last = now
            self._since = now if self._since is None else self._since
            self._stands = self._stands or now - self._since > GRACE_S
        else:
            self._since = None
        return not self._stands
