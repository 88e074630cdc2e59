"""What the head needs before it starts: the file that Ray's autoscaler reads.

Inventory, the head's NodeSpec --with_autoscaler--> file in the rack's folder, NodeSpec that names it
"""

import json
import os
from dataclasses import replace
from pathlib import Path

from pomarium.cluster.autoscaling.ray_config import HEAD_TYPE, Fleet, ray_config
from pomarium.cluster.machine.version import own_version
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.cluster.rack.inventory import Inventory
from pomarium.cluster.rack.labels import AUTOSCALER_LABEL
from pomarium.cluster.rack.mac_power import new_instance
from pomarium.cluster.rack.simulate import Prepare

FILE_NAME = "autoscaling.json"
RECORD = "macs.json"


def for_simulated(state: Path | None = None) -> Prepare:
    """What rack.simulate takes as `prepare`. `state`: as below; None: the rack's own folder, so nothing outlives it."""

    def prepare(spec: NodeSpec, inventory: Inventory, address: str, folder: Path) -> NodeSpec:
        return with_autoscaler(spec, inventory, None, address, folder, state or folder)

    return prepare


def with_autoscaler(
    spec: NodeSpec, inventory: Inventory, head_mac: str | None, address: str, folder: Path, state: Path
) -> NodeSpec:
    """`spec` of the head with an autoscaler for `inventory`, whose file is written. Raises SettingsError, OSError.

    Args:
        head_mac: which of the Macs the head is, if any. address: HOST:PORT of Ray's head.
        folder: of the rack, for the file. state: where the record of the Macs' wakes is kept.
    """
    instance = new_instance(HEAD_TYPE)
    fleet = Fleet(inventory, head_mac, instance, address, own_version(), str(state / RECORD))
    path = folder / FILE_NAME
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(ray_config(fleet), file, indent=1)  # which YAML takes as it is
    return replace(spec, instance=instance, autoscaling=path, labels={**spec.labels, AUTOSCALER_LABEL: "yes"})
