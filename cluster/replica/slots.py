"""How many requests an engine is to have at once, by what its steps show: who comes beyond that waits in the ingress.

    vLLM's statistics, one record per step --Slots.ended--> each PERIOD_S: Seen --adjusted--> Slots.count
                                                                            `--> Room (http/room.py) --> ingresses

An engine takes as many requests as its configuration allows (max_num_seqs), and with each of them all get slower:
beyond some number nothing is gained any more, and whoever comes next waits longer for a first token. That number hangs
on the model, the machine and what is asked, so it is found by looking at what running requests get:

- the gap, seconds that a request waits for its next token, stays within GAP_S, or GAPS times the shortest that was
  seen, where even that is long;
- what waits within the engine had no room in its KV cache: there is one slot more than what runs;
- it grows only where all of it was used, and by no more than GROWTH at once.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

PERIOD_S = 0.5
"""How often the number is looked at."""

FIRST = 16
"""Before anything was seen, and to an ingress that was told of none."""

LEAST = 16
"""However slow its steps are."""

GAP_S = 0.2
"""Five tokens a second, about as fast as people read."""

GAPS = 3.0
"""Of the shortest gap: two thirds of what any number of requests could gain are had by then, where a step takes a fixed
time and one more for each request."""

GROWTH, SHRINKING = 1.5, 0.8
FULL = 0.9
"""Share of the slots that counts as all of them."""

AGEING = 1.002
"""By which the shortest gap grows each period in which less than half of the slots is used: it may have been of easier
requests. While all of them are, nothing shorter is to be seen."""


@dataclass(frozen=True)
class Seen:
    """What a period showed.

    Attributes:
        running, waiting: requests in the engine, on average.
        gap_s: for which one that ran waited for a token; None: there were no tokens. least_gap_s: the shortest such.
    """

    running: float
    waiting: float
    gap_s: float | None
    least_gap_s: float


def adjusted(slots: int, seen: Seen, most: int, floor: int = 1) -> int:
    """How many slots there are to be after a period with `slots`; from `floor`, or `most`, to `most`."""
    floor = min(floor, most)
    least = max(floor, min(LEAST, most))
    if seen.waiting >= 1.0 and seen.running >= 1.0:
        return max(floor, min(slots, most, round(seen.running) + 1))
    if seen.gap_s is None:
        return max(least, min(slots, most))
    allowed_s = max(GAP_S, GAPS * seen.least_gap_s)
    factor = min(GROWTH, max(SHRINKING, allowed_s / seen.gap_s))
    if factor > 1.0:
        if seen.running < FULL * slots:
            return max(least, min(slots, most))
        return max(least, min(most, max(slots + 1, int(slots * factor))))
    return max(least, min(most, int(slots * factor)))


class Slots:
    """Attributes:
    count: requests that the engine is to have at once.
    """

    def __init__(self, most: int, floor: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: requests in a step. `floor`: there are never fewer. `clock`: seconds."""
        self.count = min(max(FIRST, floor), most)
        self._most, self._floor, self._clock = most, floor, clock
        self._least_gap_s: float | None = None
        self._last: float | None = None
        self._begin()

    def _begin(self) -> None:
        self._seconds = self._running = self._waiting = 0.0
        self._tokens = 0

    def ended(self, running: int, waiting: int, tokens: int) -> None:
        """A step has ended. running, waiting: requests now. tokens: that it made."""
        now = self._clock()
        before, self._last = self._last, now
        # Between the last step of a busy time and the first of the next one nothing ran.
        if before is not None and (passed := now - before) < PERIOD_S * 20:
            self._seconds += passed
            self._running += running * passed
            self._waiting += waiting * passed
            self._tokens += tokens
        if self._seconds >= PERIOD_S:
            self.count = adjusted(self.count, self._seen(), self._most, self._floor)
            self._begin()
        if not running and not waiting:
            self._last = None

    def _seen(self) -> Seen:
        gap_s = self._running / self._tokens if self._tokens and self._running else None
        if gap_s is not None:
            aged = AGEING if self._running < self.count * self._seconds / 2 else 1.0
            known = self._least_gap_s
            self._least_gap_s = gap_s if known is None else min(known * aged, gap_s)
        return Seen(self._running / self._seconds, self._waiting / self._seconds, gap_s, self._least_gap_s or 0.0)
