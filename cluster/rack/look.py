"""The state of a rack, read once: one way for `pomarium rack status` and for the endpoint's page.

    Ray's head: nodes, reports, sleeping Macs, Serve's processes; this machine's disks --look--> RackStatus

A process of Ray's (driver, actor) can call this at once; any other calls `reports.use` before.
"""

import time

import psutil
from ray._raylet import GcsClient  # type: ignore[attr-defined]

from pomarium.cluster.machine import disk
from pomarium.cluster.machine.version import own_version
from pomarium.cluster.rack import drains, power_states, reports, roster, serve_actors
from pomarium.cluster.rack.status import RackStatus


def look(client: GcsClient, address: str, simulated: bool, ray_folder: str) -> RackStatus:
    """Ask the rack's head, which takes milliseconds; blocks.

    Args:
        client, address: of the head. simulated: all Macs are on one machine.
        ray_folder: where Ray's files are on this machine.

    Raises:
        SettingsError: the head does not answer, or a Mac's labels are broken.
        RayError or RpcError: the head does not answer.
    """
    at = time.time()
    return RackStatus(
        address,
        simulated,
        roster.read(client),
        reports.read_all(),
        own_version(),
        reports.read_waiting(),
        power_states.read_all(),
        serve_actors.read(),
        reports.read_losses(),
        disk.shortage(disk.rooms(ray_folder)),
        at,
        psutil.virtual_memory().total,
        drains.read_all(),
    )
