"""Log-probabilities that a request asked for: the token itself, the most likely ones or those it named, and its rank.

    logits (R, V), token ids (R,) on the device --score--> Scored groups, lazily --gather--> Logprobs on the host

Column 0 is the token; the rank counts the tokens whose score is at least its own, itself included (ties therefore count
against it, as in vLLM's batched_count_greater_than). Filler columns hold token 0 with -inf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.shortlist import most_likely
from pomarium.worker.sampling.weights import log_softmax, row_groups
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import Logprobs

LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
"""vLLM's --logprobs-mode: from the logits before or after all processing, normalised or not."""

MODES: tuple[str, ...] = get_args(LogprobsMode)


def wants_logprobs(params: SamplingParams) -> bool:
    """True if the request asked for log-probabilities of its sampled tokens."""
    return params.num_logprobs is not None or bool(params.logprob_token_ids)


def scores(logits: mx.array, mode: LogprobsMode) -> mx.array:
    """What is reported for logits float32 (G, V): themselves or their log-softmax."""
    return logits if mode.endswith("logits") else log_softmax(logits)


@dataclass(frozen=True)
class Scored:
    """What is reported of G rows, lazily.

    Attributes:
        rows: which of the step's. token_ids: uint32 (G, 1 + k). logprobs: float32 (G, 1 + k). ranks: (G,).
    """

    rows: Sequence[int]
    token_ids: mx.array
    logprobs: mx.array
    ranks: mx.array

    @property
    def arrays(self) -> tuple[mx.array, mx.array, mx.array]:
        """All that is to be computed."""
        return self.token_ids, self.logprobs, self.ranks


def top_logprobs(logits: mx.array, token_ids: Sequence[int], k: int, mode: LogprobsMode) -> Logprobs:
    """For logits float32 (N, V) and N tokens, the k most likely beside each token (-1: all, ties by lower id)."""
    vocab_size = logits.shape[-1]
    size = _listed(k, vocab_size)
    parts = []
    for group in row_groups(range(logits.shape[0]), vocab_size):
        tokens = mx.array([token_ids[i] for i in group], dtype=mx.uint32)
        scored = _most_likely(logits[group[0] : group[-1] + 1], tokens, group, size, mode)
        # Evaluated group by group: a chunk of a prompt has many rows, and their intermediates need not coexist.
        mx.eval(scored.arrays)
        parts.append(tuple(np.array(array) for array in scored.arrays))
    empty = (np.zeros((0, 1 + size)), np.zeros((0, 1 + size)), np.zeros(0))
    found, logprobs, ranks = (np.concatenate(columns) for columns in zip(*(parts or [empty]), strict=True))
    return Logprobs(found.astype(np.int32), logprobs.astype(np.float32), ranks.astype(np.int64))


def score(logits: mx.array, params: Sequence[SamplingParams], token_ids: mx.array, mode: LogprobsMode) -> list[Scored]:
    """What rows that asked for log-probabilities are told, lazily.

    Args:
        logits: float32 (R, V), raw or processed according to `mode`. token_ids: int32 (R,), each below V.
    """
    token_ids = token_ids.astype(mx.uint32)
    named = [i for i, row in enumerate(params) if row.logprob_token_ids]
    scored = [
        _named(logits[i : i + 1], token_ids[i : i + 1], i, params[i].logprob_token_ids or (), mode) for i in named
    ]
    by_width: dict[int, list[int]] = {}
    for i, row in enumerate(params):
        if row.num_logprobs is not None and not row.logprob_token_ids:
            by_width.setdefault(row.num_logprobs, []).append(i)
    for k, members in by_width.items():
        for group in row_groups(members, logits.shape[-1]):
            index = mx.array(group)
            size = _listed(k, logits.shape[-1])
            scored.append(_most_likely(logits[index], token_ids[index], group, size, mode))
    return scored


def gather(scored: Sequence[Scored], token_ids: Sequence[int]) -> Logprobs | None:
    """Wait for what was scored. One width for all rows; those that asked for none are filler with rank 0.

    Args:
        token_ids: of all R rows.

    Returns:
        None if nobody asked.
    """
    if not scored:
        return None
    width = max(part.token_ids.shape[1] for part in scored)
    table = np.zeros((len(token_ids), width), dtype=np.int32)
    table[:, 0] = token_ids
    logprobs = np.full((len(token_ids), width), -np.inf, dtype=np.float32)
    ranks = np.zeros(len(token_ids), dtype=np.int64)
    for part in scored:
        rows, columns = list(part.rows), part.token_ids.shape[1]
        table[rows, :columns] = np.array(part.token_ids)
        logprobs[rows, :columns] = np.array(part.logprobs)
        ranks[rows] = np.array(part.ranks)
    return Logprobs(table, logprobs, ranks)


def _listed(k: int, vocab_size: int) -> int:
    return vocab_size if k < 0 else min(k, vocab_size)


def _most_likely(logits: mx.array, token_ids: mx.array, rows: Sequence[int], size: int, mode: LogprobsMode) -> Scored:
    values = scores(logits, mode)
    tokens = token_ids[:, None]
    own = mx.take_along_axis(values, tokens, axis=-1)
    ranks = mx.sum(values >= own, axis=-1)
    if size:
        ids, best = most_likely(values, size)
        tokens, own = mx.concatenate([tokens, ids], axis=-1), mx.concatenate([own, best], axis=-1)
    return Scored(rows, tokens, own, ranks)


def _named(logits: mx.array, token_ids: mx.array, row: int, named: Sequence[int], mode: LogprobsMode) -> Scored:
    """Of one row (1, V), the tokens in `named`; -inf for ids outside the vocabulary, which are told as token 0."""
    ids = np.array(named, dtype=np.int64)
    known = (ids >= 0) & (ids < logits.shape[-1])
    tokens = mx.concatenate([token_ids, mx.array(np.where(known, ids, 0).astype(np.uint32))])[None]
    values = scores(logits, mode)
    found = mx.take_along_axis(values, tokens, axis=-1)
    ranks = mx.sum(values >= found[:, :1], axis=-1)
    return Scored([row], tokens, mx.where(mx.array(np.concatenate([[True], known]))[None], found, -mx.inf), ranks)
