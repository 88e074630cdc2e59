"""Ray reserves one bundle with the resource `mlx` per worker; workers go onto bundles in rank order.

Slots, with the configured or surrounding placement group or none --reserve--> Reservation --> `launch`
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from pomarium.cluster.executor.staging import Slot
from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.node.worker_environment import RESOURCE
from pomarium.cluster.rack.labels import NAME_LABEL
from pomarium.worker.errors import PomariumError

NODE_LABEL = "ray.io/node-id"
"""Ray gives it to each node."""

WAKE_LOOK_S = 1.0


class PlacementError(PomariumError):
    """Ray has no room for the workers; says what is missing."""


@dataclass(frozen=True)
class Reservation:
    """Bundles for the workers.

    Attributes:
        bundles: index of each rank's bundle in `group`.
        nodes: Ray's id of each rank's node.
        owned: the group was made here and is to be removed with the executor.
    """

    group: PlacementGroup
    bundles: tuple[int, ...]
    nodes: tuple[str, ...]
    owned: bool


def worker_bundles(specs: Sequence[Mapping[str, float]]) -> tuple[int, ...]:
    """Indices of the bundles that offer the resource. Raises PlacementError if there are none."""
    offering = tuple(index for index, spec in enumerate(specs) if spec.get(RESOURCE, 0) >= 1)
    if not offering:
        raise PlacementError(
            f"The placement group has no bundle with {RESOURCE}: 1; add bundles such as {{'CPU': 1, '{RESOURCE}': 1}} "
            "to its placement_group_config."
        )
    return offering


def reserve(
    slots: Sequence[Slot],
    given: PlacementGroup | None,
    timeout_s: float,
    owner: str = "",
    coming: Callable[[], bool] = lambda: False,
) -> Reservation | None:
    """Bundles for workers on `slots`, by rank: of the `given` group, or of a new one on just these Macs.

    A new group that names Macs which are asleep is what Ray's autoscaler wakes them for: all of them or none.
    None if Ray does not place it in time: a node is lost or has been taken meanwhile, or no longer on its way.

    Args:
        owner: whoever may have to `release_of` it; "" for nobody.
        coming: asked each WAKE_LOOK_S after `timeout_s`: whether to wait on, for Macs are being woken.
    """
    if given is not None:
        indices = tuple(slot.bundle for slot in slots if slot.bundle is not None)
        return Reservation(given, indices, tuple(slot.node.id for slot in slots), owned=False)
    group = placement_group(
        [{RESOURCE: 1}] * len(slots),
        strategy="PACK",
        name=_name(owner, slots),
        bundle_label_selector=[_selector(slot.node) for slot in slots],
    )
    placed = False
    try:
        placed = group.wait(timeout_s)
        while not placed and coming():
            placed = group.wait(WAKE_LOOK_S)
    finally:
        if not placed:
            remove_placement_group(group)
    if not placed:
        return None
    where = placement_group_table(group)["bundles_to_node_id"]
    return Reservation(group, tuple(range(len(slots))), tuple(where[rank] for rank in range(len(slots))), owned=True)


def _name(owner: str, slots: Sequence[Slot]) -> str:
    """OWNER:RANDOM:MAC,...; the Macs are those that are to be woken. "" if nobody would read it."""
    asleep = ",".join(slot.node.mac.name for slot in slots if slot.node.asleep)
    return f"{owner}:{secrets.token_hex(4)}:{asleep}" if owner or asleep else ""


def claimed() -> frozenset[str]:
    """Sleeping Macs, by name, that a group waits for which Ray has not placed yet."""
    waiting = [info["name"] for info in placement_group_table().values() if info["state"] == "PENDING"]
    return frozenset(mac for name in waiting for mac in name.rpartition(":")[2].split(",") if ":" in name and mac)


def _selector(node: RackNode) -> dict[str, str]:
    """A Mac that sleeps has no node yet, and the name that its node will have."""
    return {NAME_LABEL: node.mac.name} if node.asleep else {NODE_LABEL: node.id}


def release(reservation: Reservation) -> None:
    """Give back what `reserve` took."""
    if reservation.owned and ray.is_initialized():
        remove_placement_group(reservation.group)


def release_of(owner: str) -> None:
    """Give back what a process reserved as `owner` that died: Ray keeps a group as long as its job lives."""
    names = [info["name"] for info in placement_group_table().values() if info["state"] != "REMOVED"]
    for name in names:
        if name.startswith(f"{owner}:"):
            remove_placement_group(get_placement_group(name))


def no_room(count: int, waited_s: float) -> str:
    """What to tell a user whose `count` workers found no place on a rack that others use."""
    total = ray.cluster_resources().get(RESOURCE, 0)
    free = ray.available_resources().get(RESOURCE, 0)
    return (
        f"Ray did not place {count} worker(s) within {waited_s:g} s: the cluster has {total:g} of the "
        f"resource {RESOURCE}, {free:g} free; stop another model or start a node with "
        f"--resources='{{\"{RESOURCE}\": 1}}'."
    )
