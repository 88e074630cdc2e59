"""Who is in the rack, as Ray's head knows it: asked directly, without becoming a driver, which takes seconds.

    Membership --connect--> GcsClient --read--> Members, one for each name

Import this module after `Membership.variables()` is in os.environ: Ray reads its token when it is imported.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.exceptions import AuthenticationError, RayError, RpcError

from pomarium.cluster.node import ray_address
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.rack.labels import AUTOSCALER_LABEL, MacFacts, facts_of
from pomarium.worker import local_network
from pomarium.worker.errors import SettingsError

TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Member:
    """A node.

    Attributes:
        name: a Mac's, else the node's. address: its IP address.
        alive: it answers the head. head: Ray's head runs there.
        facts: None for a node that is no Mac.
        instance: its name for Ray's autoscaler (RAY_CLOUD_INSTANCE_ID); "" if it has none.
        autoscaler: Ray's runs there.
        node: Ray's id of it, hex. drained: it ended for that, by `rack drain`.
    """

    name: str
    address: str
    alive: bool
    head: bool
    facts: MacFacts | None
    instance: str = ""
    autoscaler: bool = False
    node: str = ""
    drained: bool = False


def connect(membership: Membership) -> GcsClient:
    """A client of the rack's head. Raises SettingsError: nothing answers there, or it has another key."""
    if (fault := ray_address.fault(membership.address)) is not None:
        raise ray_address.no_rack(membership.address, fault) from fault
    try:
        return GcsClient(address=membership.address)
    except AuthenticationError as error:
        raise SettingsError(
            f"The rack at {membership.address} has another key: give the one that `pomarium rack up` has shown there."
        ) from error
    except (RayError, RpcError, OSError, RuntimeError) as error:
        said = local_network.explained(_line(error), membership.address)
        raise SettingsError(f"What answers at {membership.address} is not the rack's head ({said}).") from error


@cache
def client_of(address: str) -> GcsClient:
    """A client of the head of the Ray that this process is part of, made once. address: HOST:PORT."""
    return GcsClient(address=address)


def read(client: GcsClient) -> tuple[Member, ...]:
    """All members, the head first. Raises SettingsError if the head does not answer, or for broken labels."""
    try:
        nodes = client.get_all_node_info(timeout=TIMEOUT_S)
    except (RayError, RpcError, OSError, RuntimeError) as error:
        raise SettingsError(f"The rack's head does not answer ({_line(error)}).") from error
    return members((_member(node), _left(node)) for node in sorted(nodes.values(), key=_came))


def members(found: Iterable[tuple[Member, bool]]) -> tuple[Member, ...]:
    """One member for each name: the live node, else the last lost one.

    Args:
        found: nodes in the order of their coming, and whether they left by themselves; those are no members any more.
    """
    by_name: dict[str, Member] = {}
    for member, left in found:
        known = by_name.get(member.name)
        if not left and (known is None or member.alive or not known.alive):
            by_name[member.name] = member
        elif left and known is not None and not known.alive:
            del by_name[member.name]
    return tuple(sorted(by_name.values(), key=lambda member: (not member.head, member.name)))


def namesake(name: str, found: Iterable[Member]) -> Member | None:
    """The live member that has the name."""
    return next((member for member in found if member.alive and member.name == name), None)


def _member(node: GcsNodeInfo) -> Member:
    facts = facts_of(dict(node.labels))
    name = facts.name if facts else node.node_name
    alive = node.state == GcsNodeInfo.ALIVE
    autoscaler = AUTOSCALER_LABEL in node.labels
    drained = bool(not alive and node.death_info.reason == node.death_info.AUTOSCALER_DRAIN_PREEMPTED)
    return Member(
        name, node.node_manager_address, alive, node.is_head_node, facts, node.instance_id, autoscaler,
        node.node_id.hex(), drained,
    )  # fmt: skip


def _came(node: GcsNodeInfo) -> int:
    return int(node.start_time_ms)


def _left(node: GcsNodeInfo) -> bool:
    by_itself = (node.death_info.EXPECTED_TERMINATION, node.death_info.AUTOSCALER_DRAIN_IDLE)
    return bool(node.state == GcsNodeInfo.DEAD and node.death_info.reason in by_itself)


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
