"""Keeps a Mac in its rack, and asleep when the rack says so: `pomarium rack join HEAD --stay`, under launchd.

    Ray's head: rack.power, why the last node ended --look--> Sight --decide--> Step --Agent--> node started or ended,
    the node's raylet on this machine ---------------'                                         this machine asleep

The agent listens on nothing: it asks the head each second, with the rack's token. A node that ended without being told
to (it crashed, the head was away, the Mac was frozen) is started again; one that Ray's autoscaler drained, for it was
idle, is the order to sleep. A Mac that is not let sleep joins again at once. One that `rack drain` has let go stays
away until `rack undrain`, or until the agent itself is started anew.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NoReturn, Protocol

import psutil

from pomarium.cluster.node import kin, ray_node, starting
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.cluster.node.starting import Say
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.worker.errors import PomariumError

LOOK_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 2.0, 60.0
"""After a start that failed."""
LEAVE_S = 6.0
"""A node that ends by itself tells the head, which takes 2 s."""


class Step(Enum):
    """What there is to do."""

    STAY = "stay"
    WAIT = "wait for the head"
    STAY_AWAY = "wait for `rack undrain`"
    JOIN = "join"
    SLEEP = "sleep"


@dataclass(frozen=True)
class Sight:
    """What is seen at one time.

    Attributes:
        runs: the node's raylet lives. instance: of the node that runs or ran last; "" if none did.
        head: Ray's head answers. told: what the rack says of this Mac; None: nothing, there is no autoscaler.
        drained: the head says that the last node was drained for it was idle.
        stranger: the head has been started anew since the node joined, and knows nothing of it.
        let_go: the last node ended for that it was drained by hand, and that was not taken back.
    """

    runs: bool
    instance: str
    head: bool
    told: MacPower | None = None
    drained: bool = False
    stranger: bool = False
    let_go: bool = False


def decide(sight: Sight) -> Step:
    """What follows from it."""
    told = sight.told
    if told is not None and told.state is Power.RETIRING and sight.instance and told.instance == sight.instance:
        return Step.SLEEP
    if sight.runs:
        # The node itself would find that out after a minute, and end.
        return Step.JOIN if sight.stranger else Step.STAY
    if not sight.head:
        return Step.WAIT
    if sight.let_go:
        return Step.STAY_AWAY
    return Step.SLEEP if sight.drained else Step.JOIN


class Head(Protocol):
    """What the agent asks Ray's head."""

    def answers(self) -> bool:
        """Whether it is there."""

    def session(self) -> str:
        """Another at each start of the head. Raises PomariumError."""

    def told(self, name: str) -> MacPower | None:
        """What the rack says of the Mac. Raises PomariumError."""

    def instance(self, name: str) -> str | None:
        """What its node is to be called; None: that is not known yet (rack.power.instance_of). Raises PomariumError."""

    def drained(self, instance: str) -> bool:
        """Whether this node was drained for it was idle. Raises PomariumError."""

    def let_go(self, name: str) -> bool:
        """Whether the Mac's last node was drained by hand, and that was not taken back. Raises PomariumError."""


class Agent:
    """One Mac's.

    Args:
        spec: its node. running: it was started already.
        head: of the rack.
        asleep: puts this machine to sleep and returns when it is awake again; raises PomariumError if it may not.
        rouse: called before anything else when the machine has woken, and before each join.
    """

    def __init__(
        self,
        spec: NodeSpec,
        membership: Membership,
        head: Head,
        environ: Mapping[str, str],
        asleep: Callable[[], None],
        say: Say,
        running: bool = False,
        rouse: Callable[[], None] = lambda: None,
    ) -> None:
        self._spec, self._membership, self._head, self._environ = spec, membership, head, environ
        self._asleep, self._say, self._rouse = asleep, say, rouse
        self._raylet = self._find() if running else None
        self._ran = running
        self._session: str | None = None
        self._pause_s = FIRST_PAUSE_S
        self._last = Step.WAIT

    def run(self) -> NoReturn:
        """For as long as this process lives."""
        while True:
            self.step()
            time.sleep(LOOK_S)

    def step(self) -> Step:
        """One look, and what follows."""
        step = decide(self._look())
        if step is Step.JOIN:
            self._join()
        elif step is Step.SLEEP:
            self._sleep()
        elif step is Step.STAY_AWAY and self._last is not step:
            self._say("this Mac was drained, and its node has ended; `pomarium rack undrain` lets it join again")
        self._last = step
        return step

    def _look(self) -> Sight:
        runs = self._runs()
        instance = self._spec.instance if self._ran else ""
        if not self._head.answers():
            return Sight(runs, instance, head=False)
        try:
            session, told = self._head.session(), self._head.told(self._spec.name)
            drained = bool(instance) and not runs and self._head.drained(instance)
            let_go = self._ran and not runs and self._head.let_go(self._spec.name)
        except PomariumError as error:
            self._say(f"the head does not answer: {error}")
            return Sight(runs, instance, head=False)
        self._session = self._session or session
        return Sight(runs, instance, True, told, drained, session != self._session, let_go)

    def _join(self) -> None:
        if self._ran:
            self._say("the node ended, or the head has begun anew; joining again")
            self._end()
        try:
            self._session, instance = self._head.session(), self._head.instance(self._spec.name)
            if instance is None:
                return
            self._spec = replace(self._spec, instance=instance)
            self._rouse()  # it may have slept without having been told to
            starting.bring_up([self._spec], self._membership, self._environ, self._say)
        except PomariumError as error:
            self._say(f"not joined, tried again in {self._pause_s:g} s: {error}")
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            return
        self._pause_s = FIRST_PAUSE_S
        self._raylet, self._ran = self._find(), True

    def _sleep(self) -> None:
        self._say("the rack lets this Mac sleep")
        self._end()
        try:
            self._asleep()
        except PomariumError as error:
            self._say(f"{error}; joining again")
            return
        self._rouse()
        self._say("awake again")

    def _end(self) -> None:
        """Nothing of the node is left."""
        kin.end_all([self._kin], LEAVE_S)
        self._raylet, self._ran = None, False

    @property
    def _kin(self) -> kin.Kin:
        return ray_node.kin_of(self._spec, self._membership.session)

    def _runs(self) -> bool:
        try:
            return self._raylet is not None and self._raylet.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def _find(self) -> psutil.Process | None:
        for process in kin.members(self._kin):
            try:
                if process.name() == "raylet":
                    return process
            except psutil.NoSuchProcess:
                continue
        return None
