"""Assertions over the project's measure of equality (pomarium.worker.parity)."""

from collections.abc import Sequence

from pomarium.worker.parity import FLOAT32_BOUND as BOUND
from pomarium.worker.parity import Reference, first_mismatch, logit_error, reference

__all__ = ["BOUND", "check_tokens", "logit_error", "reference"]


def check_tokens(got: Sequence[int], want: Reference, bound: float = BOUND) -> int:
    """Assert that greedy tokens agree up to a near tie; return the number of near ties (0 or 1) and print it."""
    mismatch = first_mismatch(got, want)
    if mismatch is None:
        return 0
    assert mismatch.lead <= bound, f"{mismatch}: the lead is beyond {bound:.1e}"
    print(f"near tie: {mismatch}")
    return 1
