"""The Macs that Ray knows right now: who is alive, what they can do, and how many workers more they take.

    ray.nodes(), labels (rack.labels), resource `mlx` --survey--> RackNode ... --staging.py--> stages on Macs

    rack.power: who sleeps --wakeable--> RackNodes, asleep

A Mac that joined through `pomarium rack` carries its facts as labels. Of any other node with the resource, only the
memory that Ray itself counts is known; all such nodes are taken to be equally fast.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from pomarium.cluster.autoscaling.policy import Sleeper, wake_order
from pomarium.cluster.machine.chips import is_apple
from pomarium.cluster.node.worker_environment import RESOURCE
from pomarium.cluster.placement.model import Mac
from pomarium.cluster.rack.labels import facts_of
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.worker.errors import SettingsError

UNKNOWN_BANDWIDTH, UNKNOWN_FLOPS = 100e9, 2e12
"""Bytes/s and FLOP/s of a node without labels; only their being equal matters."""


@dataclass(frozen=True)
class RackNode:
    """A live node that offers the resource `mlx`.

    Attributes:
        id: Ray's. address: Ray's, an IP address.
        mac: name and facts; its memory is for all workers together.
        workers: how many it takes in all. free: how many more.
        apple: its workers run on a Mac's GPU.
        version: of Pomarium and Python (cluster/machine/version.py); None for a node that does not tell.
        asleep: it has no node now (`id` is empty) and gets one when it is woken, which reserving it brings about.
    """

    id: str
    address: str
    mac: Mac
    workers: int
    free: int
    apple: bool
    version: str | None = None
    asleep: bool = False


def survey() -> tuple[RackNode, ...]:
    """All live nodes with the resource, in the order of their names.

    Raises:
        SettingsError: a node's labels are damaged.
    """
    free = available_resources_per_node()
    found = []
    for node in ray.nodes():
        workers = int(node["Resources"].get(RESOURCE, 0)) if node["Alive"] else 0
        if not workers:
            continue
        facts = facts_of(node["Labels"])
        if facts is None:
            memory = int(node["Resources"].get("memory", 0))
            mac = Mac(node["NodeManagerAddress"], memory, UNKNOWN_BANDWIDTH, UNKNOWN_FLOPS)
        else:
            mac = Mac(facts.name, facts.model_memory, facts.bandwidth, facts.flops)
        left = int(free.get(node["NodeID"], {}).get(RESOURCE, 0))
        apple = facts is not None and is_apple(facts.chip)
        version = None if facts is None else facts.version
        found.append(RackNode(node["NodeID"], node["NodeManagerAddress"], mac, workers, left, apple, version))
    return tuple(sorted(found, key=lambda node: (node.mac.name, node.id)))


@dataclass(frozen=True)
class Dormant:
    """The Macs that are not there: those that would come if they were wanted, and why the others would not.

    Attributes:
        nodes: who is offered first comes first (autoscaling.policy.wake_order).
        reasons: one for each Mac that nobody can wake now.
    """

    nodes: tuple[RackNode, ...] = ()
    reasons: tuple[str, ...] = ()


def dormant(macs: Sequence[MacPower], awake: Collection[str], now: float) -> Dormant:
    """What is told of the Macs, but for those `awake`, by name. Raises SettingsError: labels are damaged.

    Args:
        now: Unix seconds.
    """
    away = {mac.name: mac for mac in macs if mac.name not in awake and mac.state is not Power.AWAKE}
    able = [mac for mac in away.values() if mac.wakeable(now)]
    order = wake_order([Sleeper(mac.name, mac.failures, mac.wakes) for mac in able])
    nodes = tuple(_dormant_node(away[name]) for name in order)
    return Dormant(nodes, tuple(f"{mac.name} ({mac.reason or mac.state})" for mac in macs
                                if mac.name in away and mac not in able))  # fmt: skip


def _dormant_node(told: MacPower) -> RackNode:
    facts = facts_of(told.labels)
    if facts is None:
        raise SettingsError(f"The rack's autoscaler tells nothing of what {told.name} can do.")
    mac = Mac(facts.name, facts.model_memory, facts.bandwidth, facts.flops)
    return RackNode("", told.address, mac, 1, 1, is_apple(facts.chip), facts.version, asleep=True)


def alive(node_ids: "set[str]") -> bool:
    """Whether Ray takes all these nodes to be alive."""
    return node_ids <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}
