"""vLLM's message of a step, with the images that the step is the first to need: what the schedulers send to workers.

    SchedulerOutput, Request.mm_features --seeing--> SeeingStep --vllm_translation.step_of--> Step

vLLM sends a request's images with its first step, whole and whether they are needed or not, and has workers keep them
as long as the request lives. Here tiles travel in the step that computes them, once, and nobody keeps them: a step's
size is bounded by the scheduler's encoder budget. Where images stand travels with the request, as in vLLM. Light, for
the engine's process imports it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput

TILES = "tiles"
"""Key of MultiModalKwargsItem under which a processor hands on an image's tiles, uint8 (N, 3, side, side)."""


@dataclass
class SeeingStep(SchedulerOutput):
    """unseen: key of an image -> its tiles, uint8 (N, 3, side, side)."""

    unseen: dict[str, np.ndarray] = field(default_factory=dict)


def seeing(step: SchedulerOutput, requests: Mapping[str, Any]) -> SchedulerOutput:
    """`step` with the tiles that it has computed and no others; `step` itself if no request of it has images.

    Args:
        requests: the scheduler's, by id.
    """
    if not step.scheduled_encoder_inputs and not any(new.mm_features for new in step.scheduled_new_reqs):
        return step
    unseen: dict[str, np.ndarray] = {}
    for request_id, indices in step.scheduled_encoder_inputs.items():
        features = requests[request_id].mm_features
        for index in indices:
            # As numpy: a pickled view of torch's takes all images of its request along.
            unseen[features[index].identifier] = features[index].data[TILES].data.numpy()
    for new in step.scheduled_new_reqs:
        new.mm_features = [replace(feature, data=None) for feature in new.mm_features]
    return SeeingStep(**vars(step) | {"unseen": unseen})
