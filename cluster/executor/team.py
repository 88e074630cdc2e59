"""The workers of one replica, planned, placed and started: from what is asked of the rack to processes that listen.

    Ask --survey, staging--> Staging --bundles.reserve--> Reservation --launch--> processes --contacts--> Team
              ^                                                                      |
              '--- a Mac was lost meanwhile, or somebody else was faster: anew ------'

Macs that are awake come first; where they do not suffice, the plan counts on sleeping ones too, and reserving these
wakes them. One that does not wake is set aside by whoever wakes it, and the next plan is made without it.
What does not fit even on an idle rack is refused at once; what waits for a Mac that others hold, or for Ray to notice a
lost one, is tried again for ASSEMBLY_TIMEOUT_S. Cutting needs the model's profile, whose imports take seconds, so one
worker where there is one Mac to take goes without.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ray._private.state import actors
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table

from pomarium.cluster.executor import bundles, launch
from pomarium.cluster.executor.bundles import PlacementError, Reservation
from pomarium.cluster.executor.codec import WorkerLostError
from pomarium.cluster.executor.launch import WorkerProcess
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.executor.staging import (
    Ask,
    Slot,
    Staging,
    bundle_slots,
    of_version,
    slots,
    stage,
    without_drained,
)
from pomarium.cluster.executor.survey import Dormant, RackNode, alive, dormant, survey
from pomarium.cluster.machine.version import own_version
from pomarium.cluster.placement.model import Refusal
from pomarium.cluster.placement.profile import read_profiles
from pomarium.cluster.rack import drains, power_states
from pomarium.cluster.rack.mac_power import Power

ASSEMBLY_TIMEOUT_S = 60.0
GROUP_TIMEOUT_S = 6.0
"""Ray places a group on free Macs within milliseconds; a node that does not answer is declared dead after about 8 s."""
ASKED_S = 20.0
"""Ray's autoscaler looks each second; a Mac that was just told to sleep is asked again when it does, after 5 s."""
PAUSE_S = 0.5
DEAD_LOOK_S = 0.05
"""How often it is looked whether Ray takes a worker for dead."""


@dataclass(frozen=True)
class Team:
    """The members by rank, with what keeps their processes alive."""

    members: tuple[Member, ...]
    processes: tuple[WorkerProcess, ...]
    reservation: Reservation

    def dissolve(self) -> None:
        """End the processes and give back their places."""
        _dissolve(self.processes, self.reservation)


def end_of(team: Team, rank: int, deadline: float) -> str | None:
    """What became of the worker of `rank`, whose connection broke: a clause. None: nothing that Ray would know.

    Args:
        deadline: of time.monotonic. Ray sees the end of a process at once, that of a node after some seconds.
    """
    member = team.members[rank]
    endpoint = member.contact.endpoint
    where = f"on {member.mac}, pid {endpoint.pid}" if member.mac != endpoint.host else f"pid {endpoint.pid}"
    actor = team.processes[rank].actor._actor_id.hex()
    while True:
        if not alive({endpoint.node_id}):
            return f"{member.mac} is gone"
        if actors(actor_id=actor).get("State") == "DEAD":
            return (
                f"its worker ({where}) crashed or was killed, as by signal 9, which the system sends when memory "
                "runs out"
            )
        if time.monotonic() > deadline:
            return None
        time.sleep(DEAD_LOOK_S)


def assemble(
    ask: Ask,
    configured: PlacementGroup | None = None,
    owner: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Team:
    """Start workers for `ask` on the rack, or on the bundles of the `configured` or surrounding placement group.

    Args:
        owner: see bundles.reserve.
        say: told each second which Macs are being woken for it, if any.

    Raises:
        PlacementError: it does not fit; says what is missing.
        WorkerLostError: worker processes do not start.
        CheckpointError, UnsupportedError: of the model's headers.
    """
    group = configured or get_current_placement_group()
    planner = _Planner(ask)
    deadline = time.monotonic() + ASSEMBLY_TIMEOUT_S
    if group is not None and not group.wait(ASSEMBLY_TIMEOUT_S):
        raise PlacementError(bundles.no_room(ask.stages or 1, ASSEMBLY_TIMEOUT_S))
    while True:
        awake, drained = without_drained(survey(), drains.read_all())
        states = power_states.read_all()
        away = Dormant() if group is not None else dormant(states, {n.mac.name for n in awake}, time.time())
        nodes, left_out = of_version(awake, own_version())
        left_out = f"{left_out} {drained}".strip()
        asleep, _ = of_version(away.nodes, own_version())
        if away.reasons:
            left_out = f"{left_out} Not woken: {', '.join(away.reasons)}.".lstrip()
        claimed = bundles.claimed() if asleep else frozenset()
        staging = planner.staging(*_slots(nodes, asleep, claimed, group, ask), left_out)
        reservation = None if staging is None else _reserve(staging, group, owner, say)
        if staging is not None and reservation is not None:
            deadline = time.monotonic() + ASSEMBLY_TIMEOUT_S  # whatever it took to get here
            processes = launch.start(reservation)
            try:
                return Team(_members(ask, staging, launch.contacts(processes, reservation)), processes, reservation)
            except WorkerLostError:
                _dissolve(processes, reservation)
                if time.monotonic() > deadline or alive(set(reservation.nodes)):
                    raise
        elif staging is not None and _asleep(staging):
            deadline = time.monotonic() + ASSEMBLY_TIMEOUT_S  # a wake takes its own time, and has its own end
        elif time.monotonic() > deadline:
            raise PlacementError(bundles.no_room(ask.stages or 1, ASSEMBLY_TIMEOUT_S))
        time.sleep(PAUSE_S)


def _reserve(
    staging: Staging, group: PlacementGroup | None, owner: str, say: Callable[[str], None]
) -> Reservation | None:
    """None: it did not come about, and is to be planned anew."""
    asleep = _asleep(staging)
    if not asleep:
        return bundles.reserve(staging.slots, group, GROUP_TIMEOUT_S, owner)
    last_waking = time.monotonic()

    def coming() -> bool:
        """Whether they are on their way: all that are missing can be woken, and of late one of them was waking.

        For the rest of ASKED_S it is time for Ray to ask for them, or to place a group whose Macs are all there. Ray
        never asks for a group that it cannot place as a whole, for one of its other Macs was taken meanwhile.
        """
        nonlocal last_waking
        told = {mac.name: mac for mac in power_states.read_all()}
        missing = [name for name in asleep if name not in told or told[name].state is not Power.AWAKE]
        if waking := [name for name in missing if name in told and told[name].state is Power.WAKING]:
            last_waking = time.monotonic()
            say(f"{' and '.join(waking)} {'is' if len(waking) == 1 else 'are'} being woken")
        able = all(name in told and told[name].wakeable(time.time()) for name in missing)
        return able and time.monotonic() - last_waking < ASKED_S

    return bundles.reserve(staging.slots, group, bundles.WAKE_LOOK_S, owner, coming)


def _asleep(staging: Staging) -> tuple[str, ...]:
    return tuple(slot.node.mac.name for slot in staging.slots if slot.node.asleep)


def _dissolve(processes: Sequence[WorkerProcess], reservation: Reservation) -> None:
    launch.kill(processes)
    bundles.release(reservation)


class _Planner:
    """Plans with the profiles that the ask brings, or that are read when they are first needed."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._profiles = ask.profiles

    def staging(
        self, free: Sequence[Slot], woken: Sequence[Slot], idle: Sequence[Slot], left_out: str
    ) -> Staging | None:
        """The stages on the `free` slots, else on the `woken` ones; None if they would fit on an idle rack only.

        Args:
            woken: free slots and those of Macs that can be woken. idle: all, as if nobody used them.
            left_out: what a refusal says of nodes that have no slots, if anything.

        Raises:
            PlacementError: they would not fit on an idle rack either.
        """
        if self._ask.stages == 1 and len(idle) == 1:
            return Staging((free[0],), (None,)) if free else None
        for offered in (free, woken) if len(woken) > len(free) else (free,):
            if isinstance(found := self._stage(offered), Staging):
                return found
        refused = self._stage(idle)
        if isinstance(refused, Refusal):
            raise PlacementError(f"{self._sentence(refused)} {left_out}".rstrip())
        return None

    def _stage(self, slots: Sequence[Slot]) -> Staging | Refusal:
        if not slots:
            return Refusal("No Mac of the rack is free.")
        if self._profiles is None:
            self._profiles = read_profiles(self._ask.source)
        apple = all(slot.node.apple for slot in slots)
        return stage(slots, self._profiles.stored if apple else self._profiles.dense, self._ask)

    def _sentence(self, refusal: Refusal) -> str:
        if refusal.missing:
            return refusal.reason
        return (
            f"{refusal.reason.rstrip('.')}: add Macs with `pomarium rack join`, ask for fewer stages, or let stages "
            "share a Mac (--share-macs)."
        )


def _slots(
    nodes: Sequence[RackNode],
    asleep: Sequence[RackNode],
    claimed: Collection[str],
    group: PlacementGroup | None,
    ask: Ask,
) -> tuple[tuple[Slot, ...], tuple[Slot, ...], tuple[Slot, ...]]:
    """Slots that are free now; those and what sleeps; and of an idle rack. The bundles of a group are ours alone.

    Args:
        claimed: sleeping Macs, by name, that are being woken for others.
    """
    if group is None:
        idle = (*(replace(node, free=node.workers) for node in nodes), *asleep)
        woken = (*nodes, *(node for node in asleep if node.mac.name not in claimed))
        share = ask.share_macs
        return slots(nodes, share), slots(woken, share), slots(idle, share)
    where = placement_group_table(group)["bundles_to_node_id"]
    offering = bundles.worker_bundles(group.bundle_specs)
    found = bundle_slots(nodes, [(index, where[index]) for index in offering])
    return found, found, found


def _members(ask: Ask, staging: Staging, contacts: Sequence[Contact]) -> tuple[Member, ...]:
    return tuple(
        Member(contact, slot.node.mac.name, ask.source, layers, slot.node.workers)
        for contact, slot, layers in zip(contacts, staging.slots, staging.cuts, strict=True)
    )
