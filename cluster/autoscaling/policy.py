"""When Macs wake and sleep, as pure functions: Ray Serve's controller, the autoscaler and the simulation call the same.

    requests at once, needs of late --wanted--> replicas of a model, what to remember
    a wake that failed --failed--> when its Mac is tried again; sleeping Macs --wake_order--> who is offered first
    rack.yaml's quiet hours, the minute of the day --quiet, quiet_ends--> whether they hold, and for how long

Times are seconds of any one clock, the same for all calls about one thing. Nothing here reads a clock, a file or Ray.
`benchmarks/rack_simulation.py` plays days of a rack through these functions; docs/benchmarks.md has the figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DAY = 24 * 60
"""Minutes."""
_ROUNDING = 1e-9
"""Less than this above a whole number of replicas is rounding: 0.3 / 0.1 replicas are three."""
_MOST_DOUBLINGS = 60
"""Of the first pause: a second would grow to 10^18, so the longest pause was reached long before."""
_NEEDS = "needs"


@dataclass(frozen=True)
class ReplicaPolicy:
    """How many replicas a model gets.

    Attributes:
        minimum, maximum: replicas, both included; a minimum of zero lets its Macs sleep.
        target: requests at once that one replica is meant to take, at most what it computes at once without loss.
        keep_s: how long the highest need of late is kept before a replica is given up, seconds.
        headroom: share of the capacity that is kept free before another replica is wanted, at least 0 and below 1. It
            pays where demand grows while a Mac wakes and loads its model, and costs that share of Macs awake.

    Raises:
        ValueError: a figure is outside its range.
    """

    minimum: int
    maximum: int
    target: float
    keep_s: float
    headroom: float

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= self.maximum:
            raise ValueError(f"replicas: 0 <= minimum <= maximum, not {self.minimum} and {self.maximum}")
        if not self.target > 0:
            raise ValueError(f"target: requests at once, more than 0, not {self.target}")
        if not self.keep_s >= 0:
            raise ValueError(f"keep_s: seconds, at least 0, not {self.keep_s}")
        if not 0 <= self.headroom < 1:
            raise ValueError(f"headroom: a share, at least 0 and below 1, not {self.headroom}")


@dataclass(frozen=True)
class Recent:
    """The needs that may still decide: an empty one remembers nothing.

    Attributes:
        needs: replicas and when that many were last needed; the times do not fall, the replicas fall. A need goes when
            as many or more are needed later, so that there are at most `maximum` + 1, however often `wanted` is called.
    """

    needs: tuple[tuple[int, float], ...] = ()

    def to_dict(self) -> dict[str, list[list[float]]]:
        """For JSON."""
        return {_NEEDS: [[count, at] for count, at in self.needs]}

    @classmethod
    def from_dict(cls, data: Mapping[str, object]) -> "Recent":
        """The inverse of `to_dict`; an empty one where there is none (Serve's first call). Other keys are let be.

        Raises:
            ValueError: what stands there is not what `to_dict` writes.
        """
        found = data.get(_NEEDS, [])
        if not isinstance(found, Sequence):
            raise ValueError(f"needs: a list, not {found!r}")
        return cls(tuple(_need(entry) for entry in found))


def _need(entry: object) -> tuple[int, float]:
    match entry:
        case [int(count), float(at) | int(at)]:
            return count, float(at)
    raise ValueError(f"a need: replicas and a time, not {entry!r}")


def remembering(replicas: int, now: float) -> Recent:
    """As if so many had been needed just now: for a caller that finds replicas and has lost what it remembered."""
    return Recent(((replicas, now),))


def needed(policy: ReplicaPolicy, ongoing: float) -> int:
    """Replicas for so many requests at once, queued ones included, without regard to what was before.

    One request, or a mean of less, never needs two replicas, whatever the headroom: it wakes one group of Macs.

    Raises:
        ValueError: `ongoing` is not a number.
    """
    if math.isnan(ongoing):
        raise ValueError("ongoing: requests at once, not nan")
    if ongoing <= 0:
        return policy.minimum
    most = policy.target * (1 - policy.headroom)
    count = 1.0 if ongoing <= 1 else max(1.0, ongoing / most)
    return max(policy.minimum, math.ceil(min(count, policy.maximum) - _ROUNDING))


def wanted(policy: ReplicaPolicy, ongoing: float, now: float, recent: Recent) -> tuple[int, Recent]:
    """Replicas wanted at `now`, and what to hand in with the next call.

    Up at once; down to the highest need of the last `keep_s` seconds, a need of exactly `keep_s` ago not counted. So
    the last replica ends `keep_s` after the last time that a request was seen. Where the clock was set back, needs that
    would lie ahead count as of now: they are kept for `keep_s` once more and not until that time comes again.

    Args:
        ongoing: requests at once, queued ones included; a mean over seconds may be a fraction.

    Raises:
        ValueError: `ongoing` is not a number.
    """
    need = needed(policy, ongoing)
    alive = [(count, min(at, now)) for count, at in recent.needs if now - at < policy.keep_s and count > need]
    kept = Recent((*alive, (need, now)))
    return min(policy.maximum, kept.needs[0][0]), kept


@dataclass(frozen=True)
class WakePolicy:
    """How long a wake may take, and what follows on one that fails.

    Attributes:
        deadline_s: from the packet until the Mac's node has joined, seconds; then the wake has failed.
        first_pause_s, longest_pause_s: for how long a Mac is set aside after its first failure, and at most, seconds.
    """

    deadline_s: float = 180.0
    first_pause_s: float = 60.0
    longest_pause_s: float = 3600.0


@dataclass(frozen=True)
class Tries:
    """What is remembered of a Mac's wakes.

    Attributes:
        failures: in a row, up to now.
        not_before: it is not woken before this time; 0 for at once.
    """

    failures: int = 0
    not_before: float = 0.0


def failed(tries: Tries, now: float, policy: WakePolicy) -> Tries:
    """A wake failed: the pause doubles with each failure in a row, up to the longest.

    An unplugged Mac costs a packet and a deadline an hour at most, one that was slow once is back after a minute.
    """
    pause = policy.first_pause_s * 2.0 ** min(tries.failures, _MOST_DOUBLINGS)
    return Tries(tries.failures + 1, now + min(pause, policy.longest_pause_s))


def woke(tries: Tries) -> Tries:
    """A wake succeeded: its failures are forgotten."""
    return Tries()


def overdue(started: float, now: float, policy: WakePolicy) -> bool:
    """Whether a wake that began at `started` and is not done has failed."""
    return now - started >= policy.deadline_s


@dataclass(frozen=True)
class Sleeper:
    """A Mac that sleeps and may be woken.

    Attributes:
        name: as in rack.yaml.
        failures: wakes in a row that failed of late.
        wakes: how often it was woken so far.
    """

    name: str
    failures: int = 0
    wakes: int = 0


def wake_order(macs: Sequence[Sleeper]) -> tuple[str, ...]:
    """Names of sleeping Macs, those first that a plan should be offered first.

    Fewest failures: a wake that fails costs its deadline, and with it all stages of a group. Then fewest wakes, which
    shares the wear. Then the name, for the same rack to give the same plan. Not by speed or memory: whether a Mac fits
    and how fast it is, is for the plan to weigh, which knows the model.
    """
    return tuple(mac.name for mac in sorted(macs, key=lambda mac: (mac.failures, mac.wakes, mac.name)))


def quiet(spans: Sequence[tuple[int, int]], minute: int) -> bool:
    """Whether a minute of the day lies in one of the spans.

    Args:
        spans: first minute and the one after the last, in minutes after midnight, 24 * 60 being midnight again. An end
            before the begin lies on the next day. Begin and end alike are a whole day, as "22:00-22:00" reads.
        minute: after midnight.
    """
    return any((minute - begin) % DAY < ((end - begin) % DAY or DAY) for begin, end in spans)


def quiet_ends(spans: Sequence[tuple[int, int]], minute: int) -> int:
    """Minutes until the first minute outside all spans: 0 where it is not quiet, `DAY` where it never ends."""
    return next((ahead for ahead in range(DAY) if not quiet(spans, minute + ahead)), DAY)
