"""The measure of equality of two ways to compute a model, for tests and for `pomarium selftest`.

Teacher-forced logits differ at most by a stated bound at every position, relative to the largest logit; free-running
greedy tokens are equal up to the first place where the reference's two best logits are closer than that bound. Such a
place is a near tie and is reported, never ignored: after it the two texts are different texts, and the comparison ends.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

FLOAT32_BOUND = 2e-5
"""Relative to the largest absolute logit: float32 sums in another order. Tiny models show 5e-6 at most."""

HALF_BOUND = 4e-2
"""The same for float16 and bfloat16 models, whose activations are rounded to 8 or 11 bits at each operation."""


@dataclass(frozen=True)
class Reference:
    """mlx-lm's own greedy continuation of a prompt.

    Attributes:
        tokens: generated. logits: float32 (prompt + generated - 1, vocab), at every position.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logits: np.ndarray


@dataclass(frozen=True)
class Mismatch:
    """Where greedy tokens part. lead: how far the reference's best logit is ahead there, relative to the largest."""

    index: int
    got: int
    want: int
    lead: float


def reference(model: nn.Module, prompt: Sequence[int], new_tokens: int) -> Reference:
    """Run mlx-lm's forward over its own cache: the prompt at once, then token by token."""
    cache = make_prompt_cache(model)
    tokens: list[int] = []
    rows = []
    feed = list(prompt)
    for _ in range(new_tokens):
        logits = model(mx.array([feed]), cache=cache)[0].astype(mx.float32)
        mx.eval(logits)
        rows.append(np.array(logits))
        feed = [int(rows[-1][-1].argmax())]
        tokens += feed
    return Reference(tuple(prompt), tuple(tokens), np.concatenate(rows))


def logit_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference of two float32 arrays of one shape, relative to the largest reference logit."""
    return float(np.abs(got - want).max() / np.abs(want).max())


def first_mismatch(got: Sequence[int], want: Reference) -> Mismatch | None:
    """Where `got`, as many tokens as the reference generated, first differs from them."""
    for index, (ours, theirs) in enumerate(zip(got, want.tokens, strict=True)):
        if ours != theirs:
            row = want.logits[len(want.prompt) - 1 + index]
            second, first = np.sort(row)[-2:]
            return Mismatch(index, ours, theirs, float((first - second) / np.abs(row).max()))
    return None
