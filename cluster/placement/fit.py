"""Whether one machine holds a model, and what that leaves for K and V. Pure.

Profile, bytes for models --fit--> Fit: bytes left, and how long a context they hold
"""

from dataclasses import dataclass, replace

from pomarium.cluster.placement.model import Workload, memory_needed
from pomarium.cluster.placement.profile import Profile

UNSAID_CONTEXT = 1 << 20
"""Tokens that are looked at where a model does not say how long its context is."""


@dataclass(frozen=True)
class Fit:
    """Attributes:
    left: bytes for K and V; negative: so many are missing for the weights alone.
    context: tokens of one sequence that fit there, at most the model's own; 0 if none does.
    """

    left: int
    context: int


def fit(profile: Profile, memory: int, *, rows: int, sampled: int, most_kv: int | None = None) -> Fit:
    """How a whole model lies in `memory` bytes.

    Args:
        rows, sampled: tokens of a step at most, and those of them that are sampled.
        most_kv: bytes that K and V take at most; None: all that are left.
    """
    workload = Workload(1, stage_bytes=profile.stage_bytes(rows=rows, sampled=sampled))
    weights, _, overhead = memory_needed(profile.model, workload, 0, len(profile.model.layers))
    left = memory - weights - overhead
    if most_kv is not None:
        left = min(left, most_kv)
    fitting, refused = 0, -(-(profile.longest_context or UNSAID_CONTEXT) // workload.block) + 1
    while refused - fitting > 1:
        blocks = (fitting + refused) // 2
        asked = replace(workload, context=blocks * workload.block)
        if sum(asked.kv_bytes(layer) for layer in profile.model.layers) > left:
            refused = blocks
        else:
            fitting = blocks
    tokens = fitting * workload.block
    return Fit(left, tokens if profile.longest_context is None else min(tokens, profile.longest_context))
