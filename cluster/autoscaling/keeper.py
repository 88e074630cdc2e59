"""Keeps the Macs of a rack awake or asleep as Ray's autoscaler asks: the state machine of fleet.py with its effects.

    provider.py --ask, retire--> Keeper --transports, a thread for each call--> Macs
                                   ^  `--every second: rack.power.publish, ledger.save
    Ray's head: who is alive ------'

Runs in Ray's monitor process on the head. A fault of one Mac (no network, ssh refused) is that Mac's failed wake, with
its reason; Ray's head not answering leaves all as it is until it answers.
"""

import datetime
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pomarium.cluster.autoscaling import fleet, ledger
from pomarium.cluster.autoscaling.fleet import FleetMac
from pomarium.cluster.autoscaling.policy import WakePolicy, quiet_ends
from pomarium.cluster.autoscaling.transport import Transport
from pomarium.cluster.rack.mac_power import FRESH_S, MacPower, Power, mac_of, new_instance
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

WAKES = WakePolicy()
TICK_S = 1.0
SETTLE_S = 15.0
"""A Mac that goes to sleep does so in 5 s, and one that is told over ssh in a few more."""
PUBLISH_S = 5.0
"""What has not changed is told again so often, before it is too old to be believed (mac_power.FRESH_S)."""


class RefusedError(PomariumError):
    """The Mac cannot be asked to wake now; says why."""


class Rack(Protocol):
    """What the keeper needs of Ray's head. All methods raise PomariumError or OSError while it does not answer."""

    def instances(self) -> Mapping[str, str]:
        """Instance of each live Mac by name; "" for one that tells none."""

    def publish(self, macs: Sequence[MacPower]) -> None:
        """As rack.power.publish."""


@dataclass(frozen=True)
class KnownMac:
    """What does not change.

    Attributes:
        address: as in rack.yaml. labels: of its node.
        transport: None: it cannot be woken.
        always: it is woken whenever it is asleep and may be.
    """

    address: str
    labels: Mapping[str, str]
    transport: Transport | None
    always: bool = False


class Keeper:
    """The Macs that may sleep.

    Args:
        known: by name. record: file that outlives the head. quiet_hours: spans of minutes after midnight.
    """

    def __init__(
        self,
        known: Mapping[str, KnownMac],
        rack: Rack,
        record: Path,
        quiet_hours: Sequence[tuple[int, int]] = (),
        policy: WakePolicy = WAKES,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._known, self._rack, self._record = dict(known), rack, record
        self._quiet_hours, self._policy, self._clock = tuple(quiet_hours), policy, clock
        self._lock = threading.RLock()
        self._telling = threading.Lock()  # what is told last is what is true
        self._macs = {mac.name: mac for mac in ledger.load(record, list(known))}
        self._published: tuple[tuple[FleetMac, ...], float, float] | None = None
        self._reaching = {name: threading.Lock() for name in known}  # a Mac is not woken while it is put to sleep
        self._heard = clock()

    def start(self) -> None:
        """Look after the Macs each second from now on, in a thread."""
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def macs(self) -> tuple[FleetMac, ...]:
        """All, by name."""
        with self._lock:
            return tuple(self._macs[name] for name in sorted(self._macs))

    def heard(self) -> None:
        """Ray's autoscaler has asked for the list of nodes. While it does not, it would act on nothing that is told."""
        self._heard = self._clock()

    def ask(self, name: str) -> str:
        """Begin to wake a Mac; the instance that it will be. Raises RefusedError.

        One that is just going to sleep is waited for: Ray keeps each refusal for good.
        """
        deadline = time.monotonic() + SETTLE_S
        while self._state(name) is Power.RETIRING and time.monotonic() < deadline:
            time.sleep(0.2)
        now = self._clock()
        with self._lock:
            mac, transport = self._macs[name], self._known[name].transport
            refusal = fleet.refusal(mac, now, self._quiet_until(now))
            if transport is None:
                refusal = f"{name} has no hardware_address in rack.yaml and cannot be woken"
            if refusal is not None or transport is None:
                raise RefusedError(refusal or name)
            self._macs[name] = fleet.ask(mac, now, new_instance(name))
            instance = self._macs[name].instance
        logger.info("waking %s as %s", name, instance)
        threading.Thread(target=self._wake, args=(name, instance, transport), name=f"wake {name}", daemon=True).start()
        return instance

    def retire(self, instance: str) -> None:
        """Put the Mac to sleep that is awake, or wakes, as `instance`; nothing happens if it is another one by now."""
        name, now = mac_of(instance), self._clock()
        with self._lock:
            mac = self._macs.get(name)
            if mac is None or mac.instance != instance:
                return
            self._macs[name] = fleet.retire(mac, now)
            transport = self._known[name].transport
        logger.info("%s goes to sleep", name)
        self._tell_or_log()
        if transport is not None:
            threading.Thread(target=self._retire, args=(name, transport), name=f"retire {name}", daemon=True).start()

    def tick(self) -> None:
        """One look at the rack."""
        instances, now = self._rack.instances(), self._clock()
        with self._lock:
            before = self._macs
            self._macs = {
                name: fleet.observe(mac, instances.get(name), now, self._policy) for name, mac in before.items()
            }
            changed = [mac for name, mac in self._macs.items() if mac.state is not before[name].state]
            due = [name for name, known in self._known.items() if known.always and self._may_wake(name, now)]
        for mac in changed:
            logger.info("%s is %s%s", mac.name, fleet.shown(mac, now), f": {mac.reason}" if mac.reason else "")
        for name in due:
            self.ask(name)
        self._tell()

    def _may_wake(self, name: str, now: float) -> bool:
        able = self._known[name].transport is not None
        return able and fleet.refusal(self._macs[name], now, self._quiet_until(now)) is None

    def _state(self, name: str) -> Power:
        with self._lock:
            return self._macs[name].state

    def _run(self) -> None:
        while True:
            try:
                self.tick()
            except (PomariumError, OSError) as error:
                logger.warning("The rack's head was not seen: %s", error)
            time.sleep(TICK_S)

    def _wake(self, name: str, instance: str, transport: Transport) -> None:
        def wanted() -> bool:
            with self._lock:
                mac = self._macs[name]
                return mac.state is Power.WAKING and mac.instance == instance

        self._tell_or_log()  # before the Mac can ask
        try:
            with self._reaching[name]:
                transport.wake(wanted)
        except PomariumError as error:
            with self._lock:
                if wanted():
                    self._macs[name] = fleet.give_up(self._macs[name], self._clock(), str(error), self._policy)
            logger.warning("%s was not woken: %s", name, error)
            self._tell_or_log()

    def _retire(self, name: str, transport: Transport) -> None:
        try:
            with self._reaching[name]:
                transport.retire()
        except PomariumError as error:
            logger.warning("%s was not put to sleep: %s", name, error)

    def _tell_or_log(self) -> None:
        """The next tick tells again what could not be told."""
        try:
            self._tell()
        except (PomariumError, OSError) as error:
            logger.warning("%s", error)

    def _tell(self) -> None:
        """Publish and record what has changed, or what was told long ago. Raises PomariumError, OSError."""
        with self._telling:
            now = self._clock()
            macs, quiet_until = self.macs(), self._quiet_until(now)
            told = self._published
            facts = tuple(_told(mac) for mac in macs)
            if told is not None and told[0] == facts and told[1] == quiet_until and now - told[2] < PUBLISH_S:
                return
            if now - self._heard > FRESH_S:
                raise PomariumError(
                    "Ray's autoscaler does nothing any more, so nobody is told to count on sleeping Macs"
                )
            self._rack.publish([self._power(mac, now, quiet_until) for mac in macs])
            self._published = (facts, quiet_until, now)
            if told is None or told[0] != facts:
                ledger.save(self._record, macs)

    def _power(self, mac: FleetMac, now: float, quiet_until: float) -> MacPower:
        known, refusal = self._known[mac.name], fleet.refusal(mac, now, quiet_until)
        return MacPower(
            mac.name,
            known.address,
            fleet.shown(mac, now),
            mac.since,
            max(mac.tries.not_before, quiet_until),
            mac.instance,
            mac.reason or (refusal or "" if mac.state is Power.ASLEEP else ""),
            mac.wakes,
            mac.tries.failures,
            known.labels,
            now,
        )

    def _quiet_until(self, now: float) -> float:
        local = datetime.datetime.fromtimestamp(now)
        ahead = quiet_ends(self._quiet_hours, local.hour * 60 + local.minute)
        return now - now % 60 + 60 * ahead if ahead else 0.0


def _told(mac: FleetMac) -> FleetMac:
    """What of a Mac others get to know: when its node was last seen is not."""
    return FleetMac(mac.name, mac.state, mac.since, mac.instance, mac.tries, mac.wakes, mac.reason)
