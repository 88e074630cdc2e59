"""What a machine's memory leaves for K and V, and how long a context that holds: by the figures that placement uses."""

from dataclasses import replace

import pytest

from pomarium.cluster.placement.fit import fit
from pomarium.cluster.placement.model import LayerProfile, ModelProfile, Workload, memory_needed
from pomarium.cluster.placement.profile import Profile

LAYER = LayerProfile(weight_bytes=1000, flops=1.0, kv_bytes=8)
MODEL = ModelProfile("m", (LAYER, LAYER), 500, 300, tied=False, hidden_bytes=4, head_flops=1.0)
PROFILE = Profile(MODEL, 2800, 0, "float32", 8, 16, 32, 4096)
STEP = {"rows": 4, "sampled": 2}
FIXED = MODEL.weight_bytes + PROFILE.stage_bytes(**STEP)


def kv(context: int) -> int:
    workload = Workload(context, stage_bytes=PROFILE.stage_bytes(**STEP))
    return memory_needed(MODEL, workload, 0, 2)[1]


def test_all_that_is_left_is_for_k_and_v() -> None:
    assert fit(PROFILE, FIXED + 123_456_789, **STEP).left == 123_456_789
    assert fit(PROFILE, FIXED + 123_456_789, most_kv=99, **STEP).left == 99


@pytest.mark.parametrize("context", [16, 160, 4096])
def test_the_longest_context_is_the_one_that_just_fits(context: int) -> None:
    assert fit(PROFILE, FIXED + kv(context), **STEP).context == context
    assert fit(PROFILE, FIXED + kv(context) - 1, **STEP).context == context - 16


def test_a_context_is_no_longer_than_the_models_own() -> None:
    assert fit(PROFILE, FIXED + 10 * kv(4096), **STEP).context == 4096
    assert fit(replace(PROFILE, longest_context=1000), FIXED + kv(4096), **STEP).context == 1000
    assert fit(replace(PROFILE, longest_context=None), FIXED + kv(8192), **STEP).context == 8192


def test_a_model_that_is_too_large_lacks_what_it_lacks() -> None:
    found = fit(PROFILE, FIXED - 77, **STEP)
    assert (found.left, found.context) == (-77, 0)
