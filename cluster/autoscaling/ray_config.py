"""rack.yaml as the file that Ray's autoscaler reads. Pure.

    Inventory, head, labels --ray_config--> dict --json, which is YAML--> `ray start --head --autoscaling-config`

Each Mac is a node type of its own, with its facts as labels and at most one node: a placement group that names Macs by
label is then demand for just these. Ray's schema asks for many keys of its cluster launcher, which we do not use;
without them the autoscaler ends silently (ray-schema.json, autoscaler/_private/util.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pomarium.cluster.node.worker_environment import RESOURCE
from pomarium.cluster.rack.inventory import Inventory
from pomarium.cluster.rack.labels import MacFacts, labels_of
from pomarium.cluster.rack.placement_inputs import rack_of

HEAD_TYPE = "head"
PROVIDER = "pomarium.cluster.autoscaling.provider.RackNodeProvider"
NEVER_S = 10.0 * 365 * 86400
LOGICAL_CPUS = 4
"""Of a Mac that sleeps: how many it has is known once it joins."""

_UNUSED: Mapping[str, Any] = {
    "auth": {}, "docker": {}, "initialization_commands": [], "setup_commands": [], "head_setup_commands": [],
    "worker_setup_commands": [], "head_start_ray_commands": [], "worker_start_ray_commands": [], "file_mounts": {},
    "cluster_synced_files": [], "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
}  # fmt: skip


@dataclass(frozen=True)
class Fleet:
    """What the autoscaler works on.

    Attributes:
        inventory: rack.yaml; its head, if it is one of the Macs, is left alone.
        head: name of the head among the Macs; None if it is no Mac.
        head_instance: of the head's node. address: HOST:PORT of Ray's head.
        version: that the Macs run (cluster/machine/version.py).
        record: file that outlives the head.
    """

    inventory: Inventory
    head: str | None
    head_instance: str
    address: str
    version: str
    record: str

    @property
    def kept_awake(self) -> frozenset[str]:
        """Macs that do not sleep, by name: the keeper wakes them, for Ray would note each refusal for good."""
        if self.inventory.sleep.idle is None:
            return frozenset(mac.name for mac in self.inventory.macs)
        return frozenset(self.inventory.sleep.always_awake)

    @property
    def labels(self) -> dict[str, dict[str, str]]:
        """Labels of each Mac that may sleep, by name."""
        speeds = {mac.name: mac for mac in rack_of(self.inventory).macs}
        return {
            entry.name: labels_of(
                MacFacts(
                    entry.name,
                    entry.chip or "unknown",
                    entry.memory,
                    speeds[entry.name].memory,
                    speeds[entry.name].bandwidth,
                    speeds[entry.name].flops,
                    self.version,
                )
            )
            for entry in self.inventory.macs
            if entry.name != self.head
        }


def ray_config(fleet: Fleet) -> dict[str, Any]:
    """The file as a document of JSON's types. Raises SettingsError for a chip that is unknown."""
    labels, sleep = fleet.labels, fleet.inventory.sleep
    types: dict[str, Any] = {
        HEAD_TYPE: {"resources": {}, "node_config": {}, "min_workers": 0, "max_workers": 0},
    }
    for name, facts in labels.items():
        types[name] = {
            "resources": {"CPU": LOGICAL_CPUS, RESOURCE: 1},
            "labels": facts,
            "node_config": {},
            "min_workers": 0,
            "max_workers": 1,
        }
        if name in fleet.kept_awake:
            types[name]["idle_timeout_s"] = NEVER_S
    return {
        "cluster_name": "pomarium",
        "max_workers": len(labels),
        "upscaling_speed": float(max(1, len(labels))),
        "idle_timeout_minutes": (sleep.idle or 0.0) / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "use_node_id_as_ip": False,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "head": {"name": fleet.head, "instance": fleet.head_instance},
            "address": fleet.address,
            "version": fleet.version,
            "record": fleet.record,
            "inventory": fleet.inventory.model_dump(mode="json"),
        },
        "available_node_types": types,
        "head_node_type": HEAD_TYPE,
        **_UNUSED,
    }
