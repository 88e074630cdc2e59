"""What a replica does that finds too few Macs: it fails, or it waits for them.

    session (command line) --endpoint_starts, endpoint_is_up--> Ray's key-value store --is_up--> replica: wait?
    replica --wait_for: the reason, every second--> rack.reports --reasons.py, `rack status`--> people

While the endpoint starts, a refusal ends the command with its reason. Once the endpoint was up, a replica that replaces
a lost one waits: Ray Serve would start it again and again, with pauses that grow to a minute and the imports of an
engine each time, where a waiting one has its imports done and starts its workers a second after the Macs are back.
"""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from ray.experimental import internal_kv

from pomarium.cluster.executor.bundles import PlacementError
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.reports import WaitingReport

logger = logging.getLogger(__name__)

T = TypeVar("T")

PAUSE_S = 1.0
_UP = b"endpoint-is-up"


def endpoint_starts() -> None:
    """From now on replicas that do not fit fail."""
    internal_kv._internal_kv_del(_UP, namespace=reports.NAMESPACE)


def endpoint_is_up() -> None:
    """From now on replicas that do not fit wait."""
    internal_kv._internal_kv_put(_UP, b"1", namespace=reports.NAMESPACE)


def is_up() -> bool:
    """Which of the two was told last."""
    return bool(internal_kv._internal_kv_exists(_UP, namespace=reports.NAMESPACE))


def wait_for(place: Callable[[], T], model: str, replica: str) -> T:
    """What `place` gives; tried again each second while the rack has no room and the endpoint was up before.

    Args:
        model, replica: as `rack status` names them.

    Raises:
        PlacementError: there is no room, and the endpoint was not up yet.
    """
    reason: str | None = None
    while True:
        try:
            placed = place()
        except PlacementError as error:
            if not is_up():
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
