"""Pauses between failed starts of an engine. Serve (Ray 2.60) makes none: on a full disk it begins three a second.

    Serve's controller, when it starts --RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH--> install
    its state of a deployment: a start failed --> none begins for pause_s(failures in a row)

Many starts fail in Ray's or Serve's own code, before there is any of ours in the process: only the controller can wait.
"""

import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

FIRST_S, LONGEST_S = 2.0, 60.0
"""After the first failed start in a row, and at most."""


def pause_s(failures: int) -> float:
    """For how long the start after so many failed ones in a row is put off: 2, 4, 8, ... 60 s."""
    return min(LONGEST_S, FIRST_S * 2.0 ** min(failures - 1, 10)) if failures > 0 else 0.0


def install(clock: Callable[[], float] = time.monotonic) -> None:
    """In the controller's process: from now on. Touches what Serve counts failed and missing replicas with
    (ray/serve/_private/deployment_state.py); it counts from zero after a deploy, and once all replicas run."""
    from ray.serve._private.deployment_state import DeploymentState

    state: Any = DeploymentState
    record, delta = state._record_replica_failure, state._get_target_replica_delta
    failed_at: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    def recording(self: Any, error_msg: str) -> None:
        failed_at[self] = clock()
        record(self, error_msg)

    def paced(self: Any) -> int:
        missing: int = delta(self)
        failures: int = self._replica_failure_count
        waits = failures > 0 and clock() < failed_at.get(self, float("-inf")) + pause_s(failures)
        return min(missing, 0) if waits else missing

    state._record_replica_failure, state._get_target_replica_delta = recording, paced
