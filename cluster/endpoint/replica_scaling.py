"""How many engines a model has, while it may have more or fewer: Ray Serve's side of autoscaling.policy.

    Serve's controller, ten times a second --requests at once, our state of the last time--> ReplicaScaling
                                           <--replicas, state--

Serve imports this module in its controller, by name (AutoscalingPolicy.policy_function). Serve's own delays are
switched off (`config`): policy.wanted keeps what was needed of late, and Serve's smoothing window is as short as its
handles' reports allow.
"""

import time
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from pomarium.cluster.autoscaling.policy import Recent, ReplicaPolicy, remembering, wanted
from pomarium.cluster.replica.serve_plan import Scaling

WINDOW_S = 12.0
"""Handles report each 10 s (at once from zero); Serve warns of a shorter window."""
HEADROOM = 0.15
"""Without it seven times as many requests wait over a second (docs/benchmarks.md, "A rack through a day")."""


class ReplicaScaling:
    """Serve's policy object: made once per deployment, from JSON."""

    def __init__(self, minimum: int, maximum: int, target: float, keep_s: float, headroom: float) -> None:
        self._policy = ReplicaPolicy(minimum, maximum, target, keep_s, headroom)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that are wanted now, and what Serve keeps for the next call."""
        now = time.time()
        recent = Recent.from_dict(context.policy_state or {})
        if not recent.needs and context.target_num_replicas > 0:  # the controller was restarted, or began from zero
            recent = remembering(context.target_num_replicas, now)
        count, recent = wanted(self._policy, context.total_num_requests, now, recent)
        return count, {**recent.to_dict()}


class AsTold:
    """Serve's policy object of a model on demand: what on_demand.py last told the controller holds."""

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Replicas that are wanted now, and nothing to keep."""
        return context.target_num_replicas, {}


def as_told(initial: int) -> AutoscalingConfig:
    """Serve's settings for it: no deployment may begin with no replica unless it scales. initial: replicas, 0 or 1."""
    policy = AutoscalingPolicy(policy_function=f"{AsTold.__module__}:{AsTold.__name__}")
    return AutoscalingConfig(min_replicas=0, initial_replicas=initial, max_replicas=1, policy=policy)


def config(scaling: Scaling) -> AutoscalingConfig:
    """Serve's settings for it."""
    policy = AutoscalingPolicy(
        policy_function=f"{ReplicaScaling.__module__}:{ReplicaScaling.__name__}",
        policy_kwargs={
            "minimum": scaling.minimum,
            "maximum": scaling.maximum,
            "target": scaling.load,
            "keep_s": scaling.keep_s,
            "headroom": HEADROOM,
        },
    )
    return AutoscalingConfig(
        min_replicas=scaling.minimum,
        initial_replicas=scaling.minimum,
        max_replicas=scaling.maximum,
        target_ongoing_requests=scaling.load,
        look_back_period_s=WINDOW_S,
        upscale_delay_s=0,
        downscale_delay_s=0,
        downscale_to_zero_delay_s=0,
        policy=policy,
    )
