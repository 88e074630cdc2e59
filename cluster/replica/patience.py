"""What an engine's process does that finds too few Macs: it fails, or it waits for them.

    who starts a group of engines --starts, came_up--> Ray's key-value store --is_up--> engine's process: wait?
    engine's process --wait_for: the reason, every second--> rack.reports --endpoint/reasons.py, `rack status`--> people

A group is the endpoint, or a batch job. While it starts, a refusal ends the command with its reason. Once it was up, a
process that replaces a lost one waits: Ray Serve would start it again and again, with the imports of an engine each
time, where a waiting one has its imports done and starts its workers a second after the Macs are back.

Whatever else keeps a replacement from starting is told (`start_failed`).
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ray.experimental import internal_kv

from pomarium.cluster.executor.bundles import PlacementError
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.reports import LossReport, WaitingReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_S = 1.0


def starts(group: str) -> None:
    """From now on engines of `group` that do not fit fail. Also at its end, for its name not to be kept."""
    internal_kv._internal_kv_del(_key(group), namespace=reports.NAMESPACE)


def came_up(group: str) -> None:
    """From now on engines of `group` that do not fit wait."""
    internal_kv._internal_kv_put(_key(group), b"1", namespace=reports.NAMESPACE)


def is_up(group: str) -> bool:
    """Which of the two was told last."""
    return bool(internal_kv._internal_kv_exists(_key(group), namespace=reports.NAMESPACE))


def start_failed(model: str, replica: str, reason: str) -> None:
    """Tell what a start of an engine of `model` failed of: Serve begins the next after a while (pacing.py)."""
    reports.publish_loss(LossReport(model, replica, f"its start failed: {reason.removesuffix('.')}", time.time()))


def _key(group: str) -> bytes:
    return b"up:" + group.encode()


def wait_for(place: Callable[[Callable[[str], None]], T], model: str, replica: str, group: str) -> T:
    """What `place` gives; tried again each second while the rack has no room and `group` was up before.

    Args:
        place: is given what to tell, each second, while Macs are being woken for it.
        model, replica: as `rack status` names them.

    Raises:
        PlacementError: there is no room, and the group was not up yet.
    """
    reason: str | None = None

    def waking(said: str) -> None:
        nonlocal reason
        reason = said
        reports.publish_waiting(WaitingReport(model, replica, f"{said}.", time.time(), waking=True))

    while True:
        try:
            placed = place(waking)
        except PlacementError as error:
            if not is_up(group):
                raise
            if str(error) != reason:
                logger.warning("%s waits for Macs: %s", model, error)
            reason = str(error)
            reports.publish_waiting(WaitingReport(model, replica, reason, time.time()))
            time.sleep(PAUSE_S)
            continue
        if reason is not None:
            reports.withdraw_waiting(replica)
        return placed
