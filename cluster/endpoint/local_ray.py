"""The Ray that serves: one of our own on the loopback interface, or the rack's (RAY_ADDRESS). And its clean end.

All processes of an own Ray inherit a marker in their environment, by which they are found at the end, whoever their
parents are by then (cluster/node/kin.py).
"""

import logging
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from pomarium.cluster import faults
from pomarium.cluster.node import kin, ray_address, ray_node, starting
from pomarium.cluster.node.direct import straight
from pomarium.cluster.node.kin import Kin
from pomarium.cluster.node.membership import SAME_PYTHON
from pomarium.cluster.node.ray_folder import RAY_FOLDER, new_session_folder
from pomarium.cluster.rack.mac_power import Power
from pomarium.cluster.replica.serve_plan import RESOURCE, ServePlan
from pomarium.worker.errors import PomariumError, SettingsError

logger = logging.getLogger(__name__)

MARKER = "POMARIUM_SESSION"
OBJECT_STORE_BYTES = 128 * 2**20
"""Requests and tokens only pass through; no tensor ever lies in the object store."""

TERM_S = 3.0
"""How long leftovers have to end after SIGTERM before they are killed."""


ATTEMPTS = 3
IMPATIENCE = (starting.IMPATIENCE, "timed out", "Timed out")
"""Of the words of a Ray that gave up because the machine is slow: within 15 s for its agents, 30 s for its node."""


class RayStartError(PomariumError):
    """A Ray of our own did not start; says why."""


class HeadLostError(PomariumError):
    """Ray's head is gone, and with it what kept the endpoint."""


@dataclass(frozen=True)
class LocalRay:
    """An embedded Ray: marker value of its processes, folder that holds RAY_FOLDER and that only its owner enters."""

    session: str
    folder: Path

    @property
    def kin(self) -> Kin:
        """How its processes are found: an engine process outlives a killed replica, for one."""
        return Kin(MARKER, self.session, self.folder)


def environment(session: str) -> dict[str, str]:
    """Variables that an embedded Ray and all its processes get; Ray reads some of them when it is imported.

    The node's address is 127.0.0.1 only without cluster support, whatever the system. A token keeps other users of this
    machine out: the loopback interface is open to all of them.
    """
    return {
        **ray_node.SERVE_VARIABLES,
        **straight(os.environ),
        MARKER: session,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
    }


def start(plan: ServePlan) -> LocalRay:
    """Start an own Ray with as many `mlx` resources as `plan` has workers.

    Raises:
        SettingsError: RAY_TMPDIR is too long (node/ray_folder.py).
        RayStartError: it does not start; says why.
    """
    session = secrets.token_hex(8)
    os.environ.update(environment(session))  # once: Ray remembers the first token that it reads
    for attempt in range(1, ATTEMPTS + 1):
        local = LocalRay(session, new_session_folder(os.environ))
        try:
            _init(local, plan)
        except Exception as error:
            reason = starting.aborted(local.folder / RAY_FOLDER) or faults.sentence(error)
            logger.exception("Ray did not start, attempt %d of %d.", attempt, ATTEMPTS)
            stop(local)
            if not any(sign in reason for sign in IMPATIENCE):
                raise RayStartError(f"Ray did not start on this machine: {reason.rstrip('.')}.") from error
        except BaseException:
            stop(local)
            raise
        else:
            return local
    raise RayStartError(
        f"Ray did not start on this machine: {ATTEMPTS} times its processes took longer than Ray allows them, for the "
        "machine is too busy. Try again when it has less to do."
    )


def _init(local: LocalRay, plan: ServePlan) -> None:
    """Raises what Ray raises."""
    import ray

    ray.init(
        address="local",
        num_cpus=math.ceil(plan.cpus()),
        num_gpus=0,
        resources={RESOURCE: plan.workers()},
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level="WARNING",
        _temp_dir=str(local.folder / RAY_FOLDER),
        _system_config=dict(ray_node.OWN_SYSTEM_CONFIG),
    )


def join(address: str, plan: ServePlan) -> None:
    """Join the rack's Ray at `address`.

    Raises:
        SettingsError: if nothing answers there or it has fewer workers than `plan` takes.
    """
    ray_address.require(address)
    import ray
    from ray.exceptions import RayError, RpcError

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.update(SAME_PYTHON)
    try:
        ray.init(address=address, logging_level="WARNING")
    except (OSError, RuntimeError, ValueError, RayError, RpcError) as e:
        said = faults.one_line(str(e))[:300]
        raise SettingsError(f"No Ray answers at RAY_ADDRESS={address} ({said}): start it or unset the variable.") from e
    from pomarium.cluster.rack import power_states

    there = ray.cluster_resources().get(RESOURCE, 0)
    asleep = sum(mac.state is not Power.AWAKE for mac in power_states.read_all())
    if there + asleep < plan.workers():
        raise SettingsError(
            f"The Ray at {address} has {there:g} of the {plan.workers()} `{RESOURCE}` resources that this takes: "
            "let more Macs join with `pomarium rack join`, or ask for fewer stages or replicas."
        )


def stop(local: LocalRay) -> None:
    """End an own Ray, every process that it left, and its folder. Raises StillThereError."""
    import ray

    try:
        ray.shutdown()
        kin.end_all([local.kin], TERM_S)
    finally:
        shutil.rmtree(local.folder, ignore_errors=True)
