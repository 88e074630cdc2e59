"""One day of one rack under one policy, event by event.

    Requests, ModelSpec, Hardware, Contender --play--> Day: waits, energy, wakes, what stood when

A request takes a slot of a replica that is up, or waits in its model's queue, first come, first served. Each second the
scaler is asked; a replica that is wanted takes all Macs of its group or none, and is up when they are awake and have
loaded the model. One that is not wanted ends with its last request.
"""

import math
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rack_simulation_load import DAY_S, Requests
from rack_simulation_policies import Contender
from rack_simulation_rack import Clock, Hardware, Limits, Mac, Power, Rack

from pomarium.cluster.autoscaling.policy import WakePolicy

TICK_S, SAMPLE_S = 1.0, 300.0
HARDWARE, WAKES = Hardware(), WakePolicy()


@dataclass(frozen=True)
class ModelSpec:
    """A model on the rack.

    Attributes:
        macs: of one replica: its stages.
        replicas: at most.
        slots: requests that a replica computes at once.
        load_s: from awake Macs until it takes requests, seconds.
    """

    name: str
    macs: int
    replicas: int
    slots: int
    load_s: float


@dataclass(frozen=True)
class Sample:
    """What stood at a time: replicas that are up, Macs that do not sleep; most requests that waited since the last."""

    time: float
    waiting: int
    up: int
    awake: int


@dataclass(frozen=True)
class Day:
    """What came of it.

    Attributes:
        requests: answered. waits: of those that had to wait, seconds, ascending.
        joules: of all Macs in that time. answering: what of it computing takes above idle.
        wakes: of each Mac. failed_wakes: of all.
        samples: one each SAMPLE_S.
    """

    requests: int
    waits: Sequence[float]
    joules: float
    answering: float
    wakes: Sequence[int]
    failed_wakes: int
    samples: Sequence[Sample] = field(repr=False)


class Replica:
    """Of one model, on the Macs that it took."""

    def __init__(self, model: "Model") -> None:
        self.model = model
        self.macs: tuple[Mac, ...] = ()
        self.up = False
        self.ending = False
        self.ongoing = 0

    def joined(self) -> None:
        """All stages load at once, when the last Mac is awake."""
        if all(mac.power is Power.IDLE for mac in self.macs):
            self.model.load(self)

    def lost(self, mac: Mac) -> None:
        """Without one stage there is no replica; the others stay awake for the next plan."""
        self.macs = tuple(own for own in self.macs if own is not mac)
        self.model.end(self)


class Model:
    """Its replicas and its queue."""

    def __init__(self, spec: ModelSpec, requests: Requests, contender: Contender, rack: Rack, clock: Clock) -> None:
        self.spec = spec
        self.times, self.work = requests.times, requests.work
        self.scaler = contender.scaler(spec.replicas)
        self.asked = 0
        self.next = 0
        self.answered = 0
        self.worked = 0.0
        self.waits = array("d")
        self.queue: deque[int] = deque()
        self.replicas: list[Replica] = []
        self._free: list[Replica] = []
        self._rack, self._clock = rack, clock

    def arrive(self) -> None:
        """The next request of the day comes."""
        number, self.next = self.next, self.next + 1
        while self._free:
            replica = self._free.pop()
            if not replica.ending:
                self._start(replica, number)
                return
        self.queue.append(number)

    def _start(self, replica: Replica, number: int) -> None:
        replica.ongoing += 1
        self._clock.at(self._clock.now + self.work[number], lambda: self._done(replica, number))

    def _done(self, replica: Replica, number: int) -> None:
        self.answered += 1
        self.worked += self.work[number]
        replica.ongoing -= 1
        if not replica.ending:
            self._fill(replica, 1)
        elif replica.ongoing == 0:
            self.end(replica)

    def _fill(self, replica: Replica, slots: int) -> None:
        """Whoever waits gets the slots; what is left is free."""
        now = self._clock.now
        while slots and self.queue:
            number = self.queue.popleft()
            self.waits.append(now - self.times[number])
            self._start(replica, number)
            slots -= 1
        self._free += [replica] * slots

    def ongoing(self) -> int:
        """Requests at once, queued ones included."""
        return self.next - self.answered

    def ask(self) -> None:
        """The scaler, and follow it."""
        now = self._clock.now
        kept = [replica for replica in self.replicas if not replica.ending]
        running = sum(replica.up for replica in kept)
        self.asked = self.scaler.wanted(now, self.ongoing(), running, self.asked)
        for _ in range(self.asked - len(kept)):
            if not self.begin():
                break
        if self.asked < len(kept):
            # As Serve does: those that do not run yet first; then, here, those with the least to finish.
            kept.sort(key=lambda replica: (replica.up, replica.ongoing))
            for replica in kept[: len(kept) - self.asked]:
                self.stop(replica)

    def begin(self) -> bool:
        """One more replica, if its Macs are to be had."""
        replica = Replica(self)
        replica.macs = self._rack.take(self.spec.macs, replica)
        if replica.macs:
            self.replicas.append(replica)
            replica.joined()
        return bool(replica.macs)

    def load(self, replica: Replica) -> None:
        """Its Macs are awake."""
        for mac in replica.macs:
            self._rack.set(mac, Power.LOADING)
        self._clock.at(self._clock.now + self.spec.load_s, lambda: self.serve(replica))

    def serve(self, replica: Replica) -> None:
        """It has loaded the model, if it was not given up meanwhile."""
        if replica.ending or replica.up:
            return
        for mac in replica.macs:
            self._rack.set(mac, Power.SERVING)
        replica.up = True
        self._fill(replica, self.spec.slots)

    def stop(self, replica: Replica) -> None:
        """It takes no more requests and ends with its last one."""
        replica.ending = True
        if replica.ongoing == 0:
            self.end(replica)

    def end(self, replica: Replica) -> None:
        """Its Macs are free."""
        replica.ending = True
        self.replicas.remove(replica)
        for mac in replica.macs:
            self._rack.give_back(mac)


@dataclass(frozen=True)
class Setting:
    """What all contenders have in common.

    Attributes:
        models: with their requests.
        length_s: of all; requests that are at work then are answered, energy is not counted further.
    """

    macs: int
    models: Sequence[tuple[ModelSpec, Requests]]
    hardware: Hardware = HARDWARE
    wakes: WakePolicy = WAKES
    seed: int = 0
    length_s: float = DAY_S


def play(setting: Setting, contender: Contender) -> Day:
    """All of it. Macs sleep at first, but for a contender whose Macs never do: there all replicas are up."""
    clock = Clock()
    limits = Limits(setting.wakes, contender.idle_s, setting.length_s)
    rack = Rack(setting.macs, clock, setting.hardware, limits, setting.seed)
    models = [Model(spec, requests, contender, rack, clock) for spec, requests in setting.models]
    if contender.idle_s is None:
        _warm_up(rack, models)
    samples = _run(clock, rack, models, setting.length_s)
    above_idle = setting.hardware.watts.busy - setting.hardware.watts.idle
    answering = sum(model.worked * model.spec.macs / model.spec.slots * above_idle for model in models)
    return Day(
        requests=sum(model.answered for model in models),
        waits=sorted(wait for model in models for wait in model.waits),
        joules=rack.joules() + answering,
        answering=answering,
        wakes=[mac.wakes for mac in rack.macs],
        failed_wakes=rack.failed_wakes,
        samples=samples,
    )


def _warm_up(rack: Rack, models: Sequence[Model]) -> None:
    for mac in rack.macs:
        rack.set(mac, Power.IDLE)
    for model in models:
        model.asked = model.spec.replicas
        while len(model.replicas) < model.asked and model.begin():
            model.serve(model.replicas[-1])


def _run(clock: Clock, rack: Rack, models: Sequence[Model], length_s: float) -> list[Sample]:
    """Until every request is answered and the time is over."""
    watch = Watch(clock, rack, models)

    def going() -> bool:
        return clock.now < length_s or any(model.ongoing() for model in models)

    def tick() -> None:
        for model in models:
            model.ask()
        watch.look()
        if going():
            clock.at(clock.now + TICK_S, tick)

    clock.at(0.0, tick)
    while clock.calls and going():
        first = min(models, key=_next_arrival)
        time = _next_arrival(first)
        if time <= clock.calls[0][0]:
            clock.now = time
            first.arrive()
        else:
            clock.step()
    return watch.samples


def _next_arrival(model: Model) -> float:
    return model.times[model.next] if model.next < len(model.times) else math.inf


class Watch:
    """Takes the samples."""

    def __init__(self, clock: Clock, rack: Rack, models: Sequence[Model]) -> None:
        self.samples: list[Sample] = []
        self._clock, self._rack, self._models = clock, rack, models
        self._waiting = 0

    def look(self) -> None:
        """At each tick."""
        self._waiting = max(self._waiting, sum(len(model.queue) for model in self._models))
        if self._clock.now % SAMPLE_S == 0:
            up = sum(replica.up and not replica.ending for model in self._models for replica in model.replicas)
            self.samples.append(Sample(self._clock.now, self._waiting, up, self._rack.awake()))
            self._waiting = 0
