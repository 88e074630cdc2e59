"""The bitmask of a structured-output grammar, applied before all else, raw log-probabilities included (vLLM's runner
calls apply_grammar_bitmask on the logits before its sampler sees them)."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.step import Grammar


def apply_grammar(logits: mx.array, rows: Sequence[SamplingRow], grammar: Grammar | None) -> mx.array:
    """Bar what the grammar does not admit, in float32 (R, V); tokens beyond the mask's end are barred too."""
    masks = grammar.bitmask if grammar else {}
    masked = [i for i, row in enumerate(rows) if row.request_id in masks]
    if not masked:
        return logits
    vocab_size = logits.shape[-1]
    bars = mx.array(np.stack([bars_of(masks[rows[i].request_id], vocab_size) for i in masked]))
    return logits + bars if len(masked) == len(rows) else logits.at[mx.array(masked)].add(bars)


def bars_of(bitmask: np.ndarray, vocab_size: int) -> np.ndarray:
    """float32 (V,): 0 where the bit of uint32 or int32 (ceil(V / 32),) is set, -inf elsewhere."""
    octets = np.ascontiguousarray(bitmask, dtype=bitmask.dtype.newbyteorder("<")).view(np.uint8)
    bits = np.unpackbits(octets, count=vocab_size, bitorder="little")
    return np.where(bits.astype(bool), np.float32(0), np.float32(-np.inf))
