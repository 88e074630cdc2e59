"""Repetition, frequency and presence penalties, on the tokens that occurred only (vLLM: ops/penalties.py).

A logit of a token in prompt or output is divided by the repetition penalty if positive, else multiplied; then each
occurrence in the output subtracts the frequency penalty, and any occurrence there the presence penalty.

    tokens on the host --Occurrences--> cells of the matrix, and counts    (a token on the device: one cell more)
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.occurrences import Occurrences
from pomarium.worker.sampling.rows import SamplingRow, late_tokens
from pomarium.worker.sampling_params import SamplingParams


def penalised(params: SamplingParams) -> bool:
    """True if any of the three penalties has an effect."""
    return params.repetition_penalty != 1 or params.frequency_penalty != 0 or params.presence_penalty != 0


def apply_penalties(logits: mx.array, rows: Sequence[SamplingRow], unread: mx.array | None = None) -> mx.array:
    """float32 (R, V) to float32 (R, V); the argument itself if no row is penalised.

    Args:
        unread: see `late_tokens`.
    """
    members = [i for i, row in enumerate(rows) if penalised(row.params)]
    if not members:
        return logits
    found = [_occurrences(rows[i], logits.shape[-1]) for i in members]
    of_cell = np.repeat(np.arange(len(members)), [len(own.tokens) for own in found])
    late = late_tokens([rows[i] for i in members], unread)
    if late is None and not of_cell.size:
        return logits
    tokens = mx.array(np.concatenate([own.tokens for own in found]))
    counts = mx.array(np.concatenate([own.counts for own in found]))
    if late is not None:
        # One cell more for each: the same as a known one's, if the token occurred before, and of the same value.
        places = np.array([j for j, i in enumerate(members) if rows[i].late is not None])
        again = (tokens == late[mx.array(of_cell)]).astype(mx.float32)
        before = mx.zeros(len(members)).at[mx.array(of_cell)].add(again * counts)
        tokens = mx.concatenate([tokens, late[mx.array(places)]])
        counts = mx.concatenate([counts + again, before[mx.array(places)] + 1])
        of_cell = np.concatenate([of_cell, places])
    of_members = np.array(
        [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (rows[i].params for i in members)],
        dtype=np.float32,
    )
    grow, frequency, presence = of_members[of_cell].T
    index = mx.array(np.array(members, dtype=np.int32)[of_cell]), tokens
    values = logits[index]
    values = values * mx.where(values > 0, mx.array(np.float32(1) / grow), mx.array(grow))
    values = values - mx.array(frequency) * counts - mx.array(presence) * (counts > 0)
    changed = mx.array(logits)
    changed[index] = values
    return changed


def _occurrences(row: SamplingRow, vocab_size: int) -> Occurrences:
    # Only repetition_penalty looks at the prompt, which may be long.
    first = 0 if row.params.repetition_penalty != 1 else row.num_prompt_tokens
    row.occurrences.take(row.token_ids, first, row.num_prompt_tokens, vocab_size)
    return row.occurrences
