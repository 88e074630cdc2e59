"""The Macs that Ray knows right now: who is alive, what they can do, and how many workers more they take.

    ray.nodes(), labels (rack.labels), resource `mlx` --survey--> RackNode ... --staging.py--> stages on Macs

A Mac that joined through `pomarium rack` carries its facts as labels. Of any other node with the resource, only the
memory that Ray itself counts is known; all such nodes are taken to be equally fast.
"""

from dataclasses import dataclass

import ray
from ray._private.state import available_resources_per_node

from pomarium.cluster.executor.environment import RESOURCE
from pomarium.cluster.placement_model import Mac
from pomarium.cluster.rack.chips import is_apple
from pomarium.cluster.rack.labels import facts_of

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
        version: of Pomarium and Python (cluster/version.py); None for a node that does not tell.
    """

    id: str
    address: str
    mac: Mac
    workers: int
    free: int
    apple: bool
    version: str | None = None


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


def alive(node_ids: "set[str]") -> bool:
    """Whether Ray takes all these nodes to be alive."""
    return node_ids <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}
