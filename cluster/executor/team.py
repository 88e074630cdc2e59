"""The workers of one replica, planned, placed and started: from what is asked of the rack to processes that listen.

    Ask --survey, staging--> Staging --bundles.reserve--> Reservation --launch--> processes --contacts--> Team
              ^                                                                      |
              '--- a Mac was lost meanwhile, or somebody else was faster: anew ------'

What does not fit even on an idle rack is refused at once; what waits for a Mac that others hold, or for Ray to notice a
lost one, is tried again for ASSEMBLY_TIMEOUT_S. Cutting needs the model's profile, whose imports take seconds, so one
worker where there is one Mac to take goes without.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table

from pomarium.cluster.executor import bundles, launch
from pomarium.cluster.executor.bundles import PlacementError, Reservation
from pomarium.cluster.executor.codec import WorkerLostError
from pomarium.cluster.executor.launch import WorkerProcess
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.executor.staging import Ask, Slot, Staging, bundle_slots, of_version, slots, stage
from pomarium.cluster.executor.survey import RackNode, alive, survey
from pomarium.cluster.model_profile import read_profiles
from pomarium.cluster.placement_model import Refusal
from pomarium.cluster.version import own_version

ASSEMBLY_TIMEOUT_S = 60.0
GROUP_TIMEOUT_S = 6.0
"""Ray places a group on free Macs within milliseconds; a node that does not answer is declared dead after about 8 s."""
PAUSE_S = 0.5


@dataclass(frozen=True)
class Team:
    """The members by rank, with what keeps their processes alive."""

    members: tuple[Member, ...]
    processes: tuple[WorkerProcess, ...]
    reservation: Reservation

    def dissolve(self) -> None:
        """End the processes and give back their places."""
        _dissolve(self.processes, self.reservation)


def assemble(ask: Ask, configured: PlacementGroup | None = None, owner: str = "") -> Team:
    """Start workers for `ask` on the rack, or on the bundles of the `configured` or surrounding placement group.

    Args:
        owner: see bundles.reserve.

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
        nodes, left_out = of_version(survey(), own_version())
        staging = planner.staging(*_slots(nodes, group, ask), left_out)
        reservation = None if staging is None else bundles.reserve(staging.slots, group, GROUP_TIMEOUT_S, owner)
        if staging is not None and reservation is not None:
            processes = launch.start(reservation)
            try:
                return Team(_members(ask, staging, launch.contacts(processes, reservation)), processes, reservation)
            except WorkerLostError:
                _dissolve(processes, reservation)
                if time.monotonic() > deadline or alive(set(reservation.nodes)):
                    raise
        elif time.monotonic() > deadline:
            raise PlacementError(bundles.no_room(ask.stages or 1, ASSEMBLY_TIMEOUT_S))
        time.sleep(PAUSE_S)


def _dissolve(processes: Sequence[WorkerProcess], reservation: Reservation) -> None:
    launch.kill(processes)
    bundles.release(reservation)


class _Planner:
    """Plans with the profiles that the ask brings, or that are read when they are first needed."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._profiles = ask.profiles

    def staging(self, free: Sequence[Slot], idle: Sequence[Slot], left_out: str) -> Staging | None:
        """The stages on the `free` slots; None if they would fit on an idle rack only.

        Args:
            left_out: what a refusal says of nodes that have no slots, if anything.

        Raises:
            PlacementError: they would not fit on an idle rack either.
        """
        if self._ask.stages == 1 and len(idle) == 1:
            return Staging((free[0],), (None,)) if free else None
        found = self._stage(free)
        if isinstance(found, Staging):
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
    nodes: Sequence[RackNode], group: PlacementGroup | None, ask: Ask
) -> tuple[tuple[Slot, ...], tuple[Slot, ...]]:
    """Slots that are free now, and on an idle rack. The bundles of a group are ours alone."""
    if group is None:
        idle = tuple(replace(node, free=node.workers) for node in nodes)
        return slots(nodes, ask.share_macs), slots(idle, ask.share_macs)
    where = placement_group_table(group)["bundles_to_node_id"]
    offering = bundles.worker_bundles(group.bundle_specs)
    found = bundle_slots(nodes, [(index, where[index]) for index in offering])
    return found, found


def _members(ask: Ask, staging: Staging, contacts: Sequence[Contact]) -> tuple[Member, ...]:
    return tuple(
        Member(contact, slot.node.mac.name, ask.source, layers, slot.node.workers)
        for contact, slot, layers in zip(contacts, staging.slots, staging.cuts, strict=True)
    )
