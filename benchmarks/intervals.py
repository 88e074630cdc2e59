"""What stages did when, and the shares of time that follow. Pure.

Intervals of a stage, Window --share--> of its time      arrivals of all streams --window, rate--> tokens/s
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

COMPUTE, HANDOFF, WAITING, SLEEP = "compute", "handoff", "waiting", "sleep"

Window = tuple[float, float]
"""Begin and end, in seconds of the monotonic clock."""


@dataclass(frozen=True)
class Interval:
    """What a stage did for step number `step` from `start` to `end`, in seconds of the monotonic clock."""

    step: int
    kind: str
    start: float
    end: float


def share(intervals: Sequence[Interval], kind: str, window: Window) -> float:
    """Part of the window that intervals of `kind`, none of which overlap, take. Raises ValueError if it is empty."""
    first, last = window
    if last <= first:
        raise ValueError("the window is empty: let the streams run for more tokens")
    return sum(max(0.0, min(i.end, last) - max(i.start, first)) for i in intervals if i.kind == kind) / (last - first)


def window(arrivals: Sequence[Sequence[float]]) -> Window:
    """While all streams run: from the last one's first token to the first one's last."""
    return max(times[0] for times in arrivals), min(times[-1] for times in arrivals)


def rate(arrivals: Sequence[Sequence[float]], within: Window) -> float:
    """Tokens per second in the window, the one that opens it not counted."""
    first, last = within
    return sum(first < time <= last for time in chain.from_iterable(arrivals)) / (last - first)


def steps_between(stages: Sequence[Sequence[Interval]], count: int) -> range:
    """`count` steps, or fewer, from the middle of those that all stages have."""
    last = min(max((i.step for i in intervals), default=-1) for intervals in stages)
    first = max(0, (last + 1 - count) // 2)
    return range(first, min(last + 1, first + count))
