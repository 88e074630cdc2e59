"""What outlives a restart of the head: which Macs did not wake of late, how often each was woken, why it sleeps.

    FleetMacs --save, whole or not at all--> file in the head's state folder --load--> FleetMacs, all asleep

Whoever is awake is seen again by its node and adopted: a wake that was under way when the head ended counts as none.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pomarium.cluster.autoscaling.fleet import FleetMac
from pomarium.cluster.autoscaling.policy import Tries

logger = logging.getLogger(__name__)


def save(path: Path, macs: Iterable[FleetMac]) -> None:
    """Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        mac.name: {
            "failures": mac.tries.failures,
            "not_before": mac.tries.not_before,
            "wakes": mac.wakes,
            "since": mac.since,
            "reason": mac.reason,
        }
        for mac in macs
    }
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: Path, names: Sequence[str]) -> tuple[FleetMac, ...]:
    """The Macs called so; of those that the file does not know, or if it is damaged, nothing is remembered."""
    known: Mapping[str, Mapping[str, object]] = {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError("it is no JSON object")
        return tuple(_mac(name, known[name]) if name in known else FleetMac(name) for name in names)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("The record of Macs' wakes, %s, cannot be read (%s): it begins anew.", path, error)
    return tuple(FleetMac(name) for name in names)


def _mac(name: str, data: Mapping[str, object]) -> FleetMac:
    failures, not_before, wakes, since = (data[key] for key in ("failures", "not_before", "wakes", "since"))
    if not (isinstance(failures, int) and isinstance(wakes, int)):
        raise ValueError(f"counts of {name} are no numbers")
    if not (isinstance(not_before, int | float) and isinstance(since, int | float)):
        raise ValueError(f"times of {name} are no numbers")
    tries = Tries(failures, float(not_before))
    return FleetMac(name, since=float(since), tries=tries, wakes=wakes, reason=str(data["reason"]))
