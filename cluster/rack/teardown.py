"""The end of what this machine runs for a rack: processes, files, network. Nothing is left."""

import shutil
from collections.abc import Mapping

from pomarium.cluster.node import kin, ray_node
from pomarium.cluster.rack import current, netns
from pomarium.cluster.rack.current import CurrentRack
from pomarium.worker.errors import SettingsError

END_S = 1.0
"""A whole rack ends: its nodes would wait for the head in vain."""
LEAVE_S = 6.0
"""A node that leaves tells the head, which takes 2 s; otherwise it would count as lost."""


def remove(rack: CurrentRack) -> None:
    """End every process, then remove what they used. Raises StillThereError if one does not end."""
    grace_s = END_S if rack.nodes[0].head else LEAVE_S
    if rack.simulated:  # first, for they would start their nodes again
        kin.end_all([ray_node.mac_kin_of(spec, rack.membership.session) for spec in rack.nodes], 0.0)
    kin.end_all([ray_node.kin_of(spec, rack.membership.session) for spec in rack.nodes], grace_s)
    shutil.rmtree(rack.folder, ignore_errors=True)
    if rack.tls is not None:
        shutil.rmtree(rack.tls, ignore_errors=True)
    if rack.network is not None:
        netns.remove(rack.network.bridge, rack.network.namespaces)


def require_none(environ: Mapping[str, str]) -> None:
    """Raises SettingsError if a rack runs on this machine, or parts of one; clears up after one that is gone."""
    rack = current.recorded(environ)
    if rack is None:
        return
    if any(kin.members(ray_node.kin_of(spec, rack.membership.session)) for spec in rack.nodes):
        raise SettingsError(
            f"This machine is in the rack at {rack.address} already: end that with `pomarium rack down` first."
        )
    down(environ)


def down(environ: Mapping[str, str]) -> CurrentRack | None:
    """End the recorded rack, or what a restart of the machine left of it; None if there is none."""
    rack = current.recorded(environ)
    if rack is not None:
        remove(rack)
        current.forget(environ)
    return rack
