"""Ray reserves one bundle with the resource `mlx` per worker; workers go onto bundles in rank order.

configured or surrounding placement group, or one of our own --> Reservation --> `launch`
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from pomarium.cluster.executor.environment import RESOURCE
from pomarium.worker.errors import PomariumError

RESERVATION_TIMEOUT_S = 60.0


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


def worker_bundles(specs: Sequence[Mapping[str, float]], count: int) -> tuple[int, ...]:
    """Indices of the first `count` bundles that offer the resource. Raises PlacementError if there are fewer."""
    offering = [index for index, spec in enumerate(specs) if spec.get(RESOURCE, 0) >= 1]
    if len(offering) < count:
        raise PlacementError(
            f"The placement group has {len(offering)} bundles with {RESOURCE}: 1 but {count} are needed; "
            f"add bundles such as {{'CPU': 1, '{RESOURCE}': 1}} to its placement_group_config."
        )
    return tuple(offering[:count])


def reserve(configured: PlacementGroup | None, count: int) -> Reservation:
    """Bundles for `count` workers, from `configured`, the group that this process runs in, or a new one.

    Raises PlacementError when Ray does not place the group within RESERVATION_TIMEOUT_S.
    """
    given = configured or get_current_placement_group()
    group = given or placement_group([{RESOURCE: 1}] * count, strategy="STRICT_SPREAD" if count > 1 else "PACK")
    try:
        if not group.wait(RESERVATION_TIMEOUT_S):
            raise PlacementError(_no_room(count))
        bundles = worker_bundles(group.bundle_specs, count)
    except BaseException:
        if given is None:
            remove_placement_group(group)
        raise
    nodes = placement_group_table(group)["bundles_to_node_id"]
    return Reservation(group, bundles, tuple(nodes[index] for index in bundles), owned=given is None)


def release(reservation: Reservation) -> None:
    """Give back what `reserve` took."""
    if reservation.owned and ray.is_initialized():
        remove_placement_group(reservation.group)


def _no_room(count: int) -> str:
    total = ray.cluster_resources().get(RESOURCE, 0)
    free = ray.available_resources().get(RESOURCE, 0)
    return (
        f"Ray did not place {count} worker(s) within {RESERVATION_TIMEOUT_S:g} s: the cluster has {total:g} of the "
        f"resource {RESOURCE}, {free:g} free; stop another model or start a node with "
        f"--resources='{{\"{RESOURCE}\": 1}}'."
    )
