"""What is compared: who decides how many replicas a model has, and when a Mac that serves nobody sleeps.

ours: cluster/autoscaling/policy.py, called as Serve's controller calls it
defaults: Ray Serve's own policy, restated from ray 2.60.0, and Ray's idle timeout
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pomarium.cluster.autoscaling.policy import Recent, ReplicaPolicy, wanted

SERVE_TARGET = 2.0
SERVE_UP_S, SERVE_DOWN_S, SERVE_LOOK_BACK_S = 30.0, 600.0, 30.0
"""ray.serve.config: target_ongoing_requests, upscale_delay_s, downscale_delay_s, look_back_period_s."""
SERVE_REPORT_S = 10.0
"""ray.serve._private.constants: RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S."""
RAY_IDLE_S = 300.0
"""idle_timeout_minutes: 5 in the defaults of Ray's cluster launcher (ray/autoscaler/aws/defaults.yaml)."""


class Scaler(Protocol):
    """Decides for one model, each second."""

    def wanted(self, now: float, ongoing: int, running: int, asked: int) -> int:
        """Replicas from now on.

        Args:
            now: seconds. ongoing: requests at once, queued ones included.
            running: replicas that take requests. asked: replicas wanted so far.
        """


@dataclass(frozen=True)
class Contender:
    """One column of the comparison.

    Attributes:
        scaler: of the most replicas that the model may have, makes the model's own.
        idle_s: a Mac without a replica sleeps after so many seconds; None for never.
    """

    name: str
    scaler: Callable[[int], Scaler]
    idle_s: float | None


class Always:
    """All replicas, always."""

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum

    def wanted(self, now: float, ongoing: int, running: int, asked: int) -> int:
        """See Scaler."""
        return self._maximum


class Reported:
    """Requests at once as Serve's controller sees them: a mean, as old as the last report of the endpoint.

    Args:
        over_s: of so many seconds before the report; 0 for the count of that moment.
        every_s: from report to report, seconds; while no replica runs, the endpoint reports at once.
    """

    def __init__(self, over_s: float, every_s: float) -> None:
        self._over_s, self._every_s = over_s, every_s
        self._seen: deque[tuple[float, int]] = deque()
        self._sum = 0
        self._mean, self._told = 0.0, -every_s

    def of(self, now: float, ongoing: int, running: int) -> float:
        """What is seen at `now`, when it is so many."""
        self._seen.append((now, ongoing))
        self._sum += ongoing
        while now - self._seen[0][0] > self._over_s:
            self._sum -= self._seen.popleft()[1]
        if running == 0 or now - self._told >= self._every_s:
            self._mean, self._told = self._sum / len(self._seen), now
        return self._mean


class ServeDefaults:
    """Serve's policy: mean requests of the look-back over the target, once that was above or below for the delay."""

    def __init__(self, maximum: int, target: float) -> None:
        self._maximum, self._target = maximum, target
        self._reported = Reported(SERVE_LOOK_BACK_S, SERVE_REPORT_S)
        self._direction, self._since = 0, 0.0

    def wanted(self, now: float, ongoing: int, running: int, asked: int) -> int:
        """See Scaler."""
        mean = self._reported.of(now, ongoing, running)
        if running == 0:
            return _cold(mean, asked)
        # Down to zero only from one, as Serve does.
        least = 0 if asked <= 1 else 1
        desired = max(least, min(self._maximum, math.ceil(mean / self._target - 1e-9)))
        direction = (desired > asked) - (desired < asked)
        if direction != self._direction:
            self._direction, self._since = direction, now
        if direction == 0 or now - self._since < (SERVE_UP_S if direction > 0 else SERVE_DOWN_S):
            return asked
        self._direction = 0
        return desired


def _cold(mean: float, asked: int) -> int:
    """While none runs, Serve asks no policy (_get_cold_start_scale_up_replicas): one replica, however many requests."""
    return max(1, asked) if mean > 0 else asked


class Ours:
    """cluster/autoscaling/policy.py as cluster/endpoint/replica_scaling.py calls it."""

    def __init__(self, policy: ReplicaPolicy, reported: Reported) -> None:
        self._policy = policy
        self._reported = reported
        self._recent = Recent()

    def wanted(self, now: float, ongoing: int, running: int, asked: int) -> int:
        """See Scaler."""
        mean = self._reported.of(now, ongoing, running)
        if running == 0 and mean > 0:
            return _cold(mean, asked)
        count, self._recent = wanted(self._policy, mean, now, self._recent)
        return count
