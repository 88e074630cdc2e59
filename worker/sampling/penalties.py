"""Repetition, frequency and presence penalties, on the tokens that occurred only (vLLM: ops/penalties.py).

A logit of a token in prompt or output is divided by the repetition penalty if positive, else multiplied; then each
occurrence in the output subtracts the frequency penalty, and any occurrence there the presence penalty.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling_params import SamplingParams


@dataclass(frozen=True)
class Penalty:
    """What one row's penalties do to n of its logits: x -> x * (shrink if x > 0 else grow) - frequency - presence.

    Attributes:
        tokens: int32 (n,), distinct. shrink, grow, frequency, presence: float32 (n,).
    """

    tokens: np.ndarray
    shrink: np.ndarray
    grow: np.ndarray
    frequency: np.ndarray
    presence: np.ndarray


def penalised(params: SamplingParams) -> bool:
    """True if any of the three penalties has an effect."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def row_penalty(row: SamplingRow, vocab_size: int) -> Penalty:
    """The tokens that occurred and what happens to them; ids outside the vocabulary are ignored."""
    params = row.params
    output, counts = np.unique(_in_vocabulary(row.output_token_ids, vocab_size), return_counts=True)
    # Only repetition_penalty looks at the prompt, which may be long.
    prompt = _in_vocabulary(row.prompt_token_ids if params.repetition_penalty != 1 else (), vocab_size)
    tokens = np.union1d(output, prompt).astype(np.int32)
    occurrences = np.zeros(len(tokens), dtype=np.float32)
    occurrences[np.searchsorted(tokens, output)] = counts
    grow = np.full(len(tokens), params.repetition_penalty, dtype=np.float32)
    return Penalty(
        tokens=tokens,
        shrink=np.float32(1) / grow,
        grow=grow,
        frequency=np.float32(params.frequency_penalty) * occurrences,
        presence=np.float32(params.presence_penalty) * (occurrences > 0),
    )


def apply_penalties(logits: mx.array, rows: Sequence[SamplingRow]) -> mx.array:
    """float32 (R, V) to float32 (R, V); the argument itself if no row is penalised."""
    vocab_size = logits.shape[-1]
    found = [(i, row_penalty(row, vocab_size)) for i, row in enumerate(rows) if penalised(row.params)]
    if not sum(len(penalty.tokens) for _, penalty in found):
        return logits
    row_ids = mx.array(np.concatenate([np.full(len(penalty.tokens), i, dtype=np.int32) for i, penalty in found]))
    tokens = _joined([penalty.tokens for _, penalty in found])
    values = logits[row_ids, tokens]
    values = values * mx.where(values > 0, _joined([p.shrink for _, p in found]), _joined([p.grow for _, p in found]))
    values = values - _joined([p.frequency for _, p in found]) - _joined([p.presence for _, p in found])
    changed = mx.array(logits)
    changed[row_ids, tokens] = values
    return changed


def _joined(parts: Sequence[np.ndarray]) -> mx.array:
    return mx.array(np.concatenate(parts))


def _in_vocabulary(token_ids: Sequence[int], vocab_size: int) -> np.ndarray:
    ids = np.array(token_ids, dtype=np.int64)
    return ids[(ids >= 0) & (ids < vocab_size)]
