"""Macs that wake, serve, idle and sleep, on a virtual clock, and the energy that they take.

    replica wants N Macs --take--> all of them or none; those that sleep are woken
    wake --joined, or lost at its deadline--> whoever holds the Mac; --give_back, idle for long enough--> asleep

A wake that fails is told at its deadline; its Mac is set aside as cluster/autoscaling/policy.py says.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from pomarium.cluster.autoscaling import policy
from pomarium.cluster.autoscaling.policy import Sleeper, Tries, WakePolicy


@dataclass(frozen=True)
class Watts:
    """What a Mac takes at the wall.

    Attributes:
        idle, busy: "Idle" and "Max" of a Mac Studio with M2 Ultra on Apple's page "Mac Studio power consumption and
            thermal output (BTU) information" (support.apple.com/102027). Idle there is with only Finder open. Between
            them a Mac is taken to draw in proportion to the requests that it computes.
        asleep: assumed; Apple's page has no figure.
        starting: assumed, from the packet until the model is loaded; no figure either.
    """

    asleep: float = 1.0
    idle: float = 10.0
    busy: float = 295.0
    starting: float = 40.0


@dataclass(frozen=True)
class Hardware:
    """What Macs do. None of it was measured on a Mac.

    Attributes:
        answers_s: least and most from the packet until the Mac answers on the network, seconds, evenly spread.
        node_s: from then on until its node has joined, seconds (`benchmarks/autoscale.py` measures it without Macs).
        failing: share of wakes that come to nothing.
    """

    watts: Watts = field(default_factory=Watts)
    answers_s: tuple[float, float] = (5.0, 15.0)
    node_s: float = 10.0
    failing: float = 0.02


class Clock:
    """Calls in the order of their times; of equal times the one that was set first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time: float, call: Callable[[], None]) -> None:
        """Call it at `time`."""
        heappush(self.calls, (time, next(self._numbers), call))

    def step(self) -> None:
        """The next call."""
        self.now, _, call = heappop(self.calls)
        call()


class Power(Enum):
    """What a Mac does."""

    ASLEEP = auto()
    WAKING = auto()
    IDLE = auto()
    LOADING = auto()
    SERVING = auto()


class Holder(Protocol):
    """Who took Macs."""

    def joined(self) -> None:
        """One of its Macs is awake now."""

    def lost(self, mac: "Mac") -> None:
        """This Mac of its own did not wake, and is not its own any more."""


@dataclass
class Mac:
    """One Mac; `seconds` by what it did, up to `since`."""

    name: str
    power: Power = Power.ASLEEP
    since: float = 0.0
    holder: Holder | None = None
    tries: Tries = field(default_factory=Tries)
    wakes: int = 0
    seconds: dict[Power, float] = field(default_factory=lambda: dict.fromkeys(Power, 0.0))


@dataclass(frozen=True)
class Limits:
    """What the rack is told of time.

    Attributes:
        wakes: how long one may take, and what follows.
        idle_s: a Mac without a replica sleeps after so many seconds; None for never.
        length_s: energy counts up to this time.
    """

    wakes: WakePolicy
    idle_s: float | None
    length_s: float


class Rack:
    """Its Macs, all asleep. `seed`: of how long wakes take and which fail."""

    def __init__(self, macs: int, clock: Clock, hardware: Hardware, limits: Limits, seed: int) -> None:
        self.macs = [Mac(f"mac-{number:03d}") for number in range(macs)]
        self.failed_wakes = 0
        self._clock, self._hardware, self._limits = clock, hardware, limits
        self._source = random.Random(seed)
        self._by_name = {mac.name: mac for mac in self.macs}

    def take(self, number: int, holder: Holder) -> tuple[Mac, ...]:
        """So many Macs, awake ones first, the others woken; empty if there are not so many."""
        free = self._free()
        if len(free) < number:
            return ()
        taken = tuple(free[:number])
        for mac in taken:
            mac.holder = holder
            if mac.power is Power.ASLEEP:
                self._wake(mac)
        return taken

    def _free(self) -> list[Mac]:
        now = self._clock.now
        nobodys = [mac for mac in self.macs if mac.holder is None]
        up = [mac for power in (Power.IDLE, Power.WAKING) for mac in nobodys if mac.power is power]
        asleep = [mac for mac in nobodys if mac.power is Power.ASLEEP and mac.tries.not_before <= now]
        order = policy.wake_order([Sleeper(mac.name, mac.tries.failures, mac.wakes) for mac in asleep])
        return up + [self._by_name[name] for name in order]

    def give_back(self, mac: Mac) -> None:
        """It serves nobody now; it sleeps when it was idle for `idle_s`."""
        mac.holder = None
        if mac.power not in (Power.ASLEEP, Power.WAKING):
            self._idle(mac)

    def _idle(self, mac: Mac) -> None:
        self.set(mac, Power.IDLE)
        since, idle_s = mac.since, self._limits.idle_s
        if idle_s is not None:
            self._clock.at(since + idle_s, lambda: self._sleep(mac, since))

    def _sleep(self, mac: Mac, since: float) -> None:
        if mac.power is Power.IDLE and mac.since == since and mac.holder is None:
            self.set(mac, Power.ASLEEP)

    def _wake(self, mac: Mac) -> None:
        self.set(mac, Power.WAKING)
        mac.wakes += 1
        started = self._clock.now
        takes = self._source.uniform(*self._hardware.answers_s) + self._hardware.node_s
        fails = self._source.random() < self._hardware.failing
        if fails or policy.overdue(started, started + takes, self._limits.wakes):
            self._clock.at(started + self._limits.wakes.deadline_s, lambda: self._failed(mac))
        else:
            self._clock.at(started + takes, lambda: self._joined(mac))

    def _joined(self, mac: Mac) -> None:
        mac.tries = policy.woke(mac.tries)
        self._idle(mac)
        if mac.holder is not None:
            mac.holder.joined()

    def _failed(self, mac: Mac) -> None:
        self.failed_wakes += 1
        mac.tries = policy.failed(mac.tries, self._clock.now, self._limits.wakes)
        self.set(mac, Power.ASLEEP)
        holder, mac.holder = mac.holder, None
        if holder is not None:
            holder.lost(mac)

    def set(self, mac: Mac, power: Power) -> None:
        """From now on it does this."""
        now = self._clock.now
        mac.seconds[mac.power] += max(0.0, min(now, self._limits.length_s) - mac.since)
        mac.power, mac.since = power, now

    def awake(self) -> int:
        """Macs that do not sleep."""
        return sum(mac.power is not Power.ASLEEP for mac in self.macs)

    def joules(self) -> float:
        """Of all Macs up to now, without what computing takes above idle."""
        watts = self._hardware.watts
        draws = {Power.ASLEEP: watts.asleep, Power.WAKING: watts.starting, Power.LOADING: watts.starting}
        for mac in self.macs:
            self.set(mac, mac.power)
        return sum(draws.get(power, watts.idle) * s for mac in self.macs for power, s in mac.seconds.items())
