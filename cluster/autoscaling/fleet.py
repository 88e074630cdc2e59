"""What becomes of each Mac of a rack that sleeps: a state machine over what Ray's head sees and what is asked. Pure.

                  ask                        its node came                     retire
    asleep --------------> waking -----------------------------> awake --------------------> going to sleep
      ^  ^                   |                                     |  ^                            |
      |  `--- overdue: set aside with back-off ---                 |  `-- by hand: adopted         |
      `------------- its node was lost ----------------------------'                               |
      `------------------------------- its node ended ---------------------------------------------'

A Mac is named as in rack.yaml; each time that it is awake is an instance (rack/mac_power.py), which is also what the
rest of the rack is told of it.
"""

from dataclasses import dataclass, field, replace

from pomarium.cluster.autoscaling.policy import Tries, WakePolicy, failed, overdue, woke
from pomarium.cluster.rack.mac_power import Power

RETIRE_S = 5.0
"""A Mac's agent, which looks each second, sees that it is to sleep; Ray ends a drained node before it says so."""

LOST_S = 10.0
"""A node that is away for so long while its Mac is said to be awake is lost: agents join again sooner."""


@dataclass(frozen=True)
class FleetMac:
    """One Mac.

    Attributes:
        name: as in rack.yaml.
        state: now. since: when it came to it, Unix seconds.
        instance: its name for Ray's autoscaler while it is not asleep; "" else.
        tries: failed wakes of late. wakes: how often it was asked to wake.
        reason: why it is as it is, for people; "" if there is nothing to say.
        seen: when its node was last seen, Unix seconds.
    """

    name: str
    state: Power = Power.ASLEEP
    since: float = 0.0
    instance: str = ""
    tries: Tries = field(default_factory=Tries)
    wakes: int = 0
    reason: str = ""
    seen: float = 0.0

    def to(self, state: Power, now: float, reason: str = "", instance: str | None = None) -> "FleetMac":
        """This Mac in another state."""
        return replace(
            self, state=state, since=now, reason=reason, instance=self.instance if instance is None else instance
        )


def refusal(mac: FleetMac, now: float, quiet_until: float) -> str | None:
    """Why the Mac cannot be asked to wake; None if it can.

    Args:
        quiet_until: end of the quiet hours that are now, Unix seconds; 0 if there are none.
    """
    if mac.state is not Power.ASLEEP:
        return f"{mac.name} is {mac.state}"
    if mac.tries.not_before > now:
        return f"{mac.name} did not wake {mac.tries.failures} time(s) and is set aside"
    if quiet_until > now:
        return f"{mac.name} sleeps through the quiet hours"
    return None


def ask(mac: FleetMac, now: float, instance: str) -> FleetMac:
    """It is being woken, as `instance`. Only if `refusal` has nothing against it."""
    return replace(mac.to(Power.WAKING, now, mac.reason, instance), wakes=mac.wakes + 1)


def retire(mac: FleetMac, now: float) -> FleetMac:
    """It is to go to sleep; nothing changes for one that sleeps or goes to sleep already."""
    if mac.state in (Power.ASLEEP, Power.RETIRING):
        return mac
    return mac.to(Power.RETIRING, now)


def give_up(mac: FleetMac, now: float, reason: str, policy: WakePolicy) -> FleetMac:
    """The wake failed: the Mac is left alone for a while."""
    return replace(mac.to(Power.ASLEEP, now, reason, ""), tries=failed(mac.tries, now, policy))


def observe(mac: FleetMac, instance: str | None, now: float, policy: WakePolicy) -> FleetMac:
    """What is true of a Mac whose live node is `instance`; None: it has none; "": one that tells no instance."""
    if instance is not None:
        return _with_node(replace(mac, seen=now), instance, now)
    return _without_node(mac, now, policy)


def _with_node(mac: FleetMac, instance: str, now: float) -> FleetMac:
    if mac.state is Power.RETIRING and instance == mac.instance:
        return mac
    if mac.state is Power.AWAKE and instance == mac.instance:
        return mac
    # Woken by us, or by hand, or back after it was lost: it is there.
    return replace(mac.to(Power.AWAKE, now, "", instance), tries=woke(mac.tries))


def _without_node(mac: FleetMac, now: float, policy: WakePolicy) -> FleetMac:
    if mac.state is Power.WAKING and overdue(mac.since, now, policy):
        return give_up(mac, now, f"it did not join within {policy.deadline_s:g} s of its wake-up packet", policy)
    if mac.state is Power.RETIRING and now - mac.since >= RETIRE_S:
        return mac.to(Power.ASLEEP, now, "", "")
    if mac.state is Power.AWAKE and now - max(mac.seen, mac.since) >= LOST_S:
        return mac.to(Power.ASLEEP, now, "its node was lost", "")
    return mac


def shown(mac: FleetMac, now: float) -> Power:
    """The state as people see it: an asleep one that is left alone is set aside."""
    return Power.SET_ASIDE if mac.state is Power.ASLEEP and mac.tries.not_before > now else mac.state
