"""Log-probabilities that a request asked for: the token itself, the most likely ones or those it named, and its rank.

Column 0 is the token; the rank counts the tokens whose score is at least its own, itself included (ties therefore count
against it, as in vLLM's batched_count_greater_than). Filler columns hold token 0 with -inf.
"""

from collections.abc import Sequence
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


def top_logprobs(logits: mx.array, token_ids: Sequence[int], k: int, mode: LogprobsMode) -> Logprobs:
    """For logits float32 (N, V) and N tokens, the k most likely beside each token (-1: all, ties by lower id)."""
    vocab_size = logits.shape[-1]
    size = vocab_size if k < 0 else min(k, vocab_size)
    parts = []
    for group in row_groups(range(logits.shape[0]), vocab_size):
        values = scores(logits[group[0] : group[-1] + 1], mode)
        tokens = mx.array([token_ids[i] for i in group], dtype=mx.uint32)[:, None]
        own = mx.take_along_axis(values, tokens, axis=-1)
        ranks = mx.sum(values >= own, axis=-1)
        if size:
            ids, best = most_likely(values, size)
            tokens, own = mx.concatenate([tokens, ids], axis=-1), mx.concatenate([own, best], axis=-1)
        # Evaluated group by group: a chunk of a prompt has many rows, and their intermediates need not coexist.
        mx.eval(tokens, own, ranks)
        parts.append((np.array(tokens), np.array(own), np.array(ranks)))
    return _joined(parts, 1 + size)


def named_logprobs(logits: mx.array, token_id: int, named: Sequence[int], mode: LogprobsMode) -> Logprobs:
    """For one row float32 (1, V), the tokens in `named`; -inf for ids outside the vocabulary."""
    vocab_size = logits.shape[-1]
    ids = np.array([token_id, *named], dtype=np.int64)
    known = (ids >= 0) & (ids < vocab_size)
    ids = np.where(known, ids, 0)
    values = scores(logits, mode)[0]
    found, rank = values[mx.array(ids.astype(np.uint32))], mx.sum(values >= values[token_id])
    mx.eval(found, rank)
    reported = np.where(known, np.array(found), np.float32(-np.inf))
    return _joined([(ids[None], reported[None], np.array(rank)[None])], len(ids))


def sampled_logprobs(
    logits: mx.array, params: Sequence[SamplingParams], token_ids: Sequence[int], mode: LogprobsMode
) -> Logprobs | None:
    """Each request's log-probabilities, widened to the widest; rows that asked for none are filler with rank 0.

    Args:
        logits: float32 (R, V), raw or processed according to `mode`.
    """
    found: dict[int, Logprobs] = {}
    by_width: dict[int, list[int]] = {}
    for i, row in enumerate(params):
        if row.logprob_token_ids:
            found[i] = named_logprobs(logits[i : i + 1], token_ids[i], row.logprob_token_ids, mode)
        elif row.num_logprobs is not None:
            by_width.setdefault(row.num_logprobs, []).append(i)
    for k, members in by_width.items():
        part = top_logprobs(logits[mx.array(members)], [token_ids[i] for i in members], k, mode)
        for j, i in enumerate(members):
            found[i] = Logprobs(part.token_ids[j : j + 1], part.logprobs[j : j + 1], part.ranks[j : j + 1])
    return _scattered(found, token_ids) if found else None


def _scattered(found: dict[int, Logprobs], token_ids: Sequence[int]) -> Logprobs:
    width = max(part.token_ids.shape[1] for part in found.values())
    table = np.zeros((len(token_ids), width), dtype=np.int32)
    table[:, 0] = token_ids
    logprobs = np.full((len(token_ids), width), -np.inf, dtype=np.float32)
    ranks = np.zeros(len(token_ids), dtype=np.int64)
    for i, part in found.items():
        columns = part.token_ids.shape[1]
        table[i, :columns], logprobs[i, :columns], ranks[i] = part.token_ids[0], part.logprobs[0], part.ranks[0]
    return Logprobs(table, logprobs, ranks)


def _joined(parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], width: int) -> Logprobs:
    empty = (np.zeros((0, width)), np.zeros((0, width)), np.zeros(0))
    tokens, logprobs, ranks = (np.concatenate(columns) for columns in zip(*(parts or [empty]), strict=True))
    return Logprobs(tokens.astype(np.int32), logprobs.astype(np.float32), ranks.astype(np.int64))
