"""Changes to single logits: (row, token, value) triples worked out on the host, applied in MLX by one scatter a stage.

The stages in vLLM 0.29's order (vllm/v1/sample/sampler.py, logits_processor/__init__.py): allowed_token_ids, bad_words,
min_tokens, logit_bias. Each takes and returns float32 (R, V) and returns its argument itself if no row needs it. Token
ids outside the vocabulary are ignored: vLLM does not check stop_token_ids against it, and a scatter in MLX would write
out of bounds.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.rows import SamplingRow, late_tokens


@dataclass(frozen=True)
class Cells:
    """Cells of a (R, V) matrix: int32 (n,) each."""

    rows: np.ndarray
    tokens: np.ndarray

    @property
    def index(self) -> tuple[mx.array, mx.array]:
        """The pair as an MLX index."""
        return mx.array(self.rows), mx.array(self.tokens)


def cells(tokens_of: Iterable[tuple[int, Collection[int]]], vocab_size: int) -> Cells:
    """Cells named by (row, its tokens) pairs, less tokens outside the vocabulary."""
    pairs = [(row, token) for row, tokens in tokens_of for token in tokens if 0 <= token < vocab_size]
    table = np.array(pairs, dtype=np.int32).reshape(-1, 2)
    return Cells(table[:, 0], table[:, 1])


def allow_only(logits: mx.array, rows: Sequence[SamplingRow]) -> mx.array:
    """Bar every token but `allowed_token_ids`."""
    wanted = [(i, row.params.allowed_token_ids) for i, row in enumerate(rows) if row.params.allowed_token_ids]
    if not wanted:
        return logits
    allowed = cells([(i, set(tokens or ())) for i, tokens in wanted], logits.shape[-1])
    values = logits[allowed.index]
    masked = mx.array(logits)
    masked[mx.array([i for i, _ in wanted])] = -mx.inf
    return _set(masked, allowed, values)


def bar_bad_words(logits: mx.array, rows: Sequence[SamplingRow], unread: mx.array | None = None) -> mx.array:
    """Bar the last token of each bad word whose other tokens end the output so far.

    Args:
        unread: see `late_tokens`.
    """
    members = [i for i, row in enumerate(rows) if row.params.bad_words]
    found = [_completions(rows[i]) for i in members]
    vocab_size = logits.shape[-1]
    barred = _bar(logits, cells(zip(members, (known for known, _ in found), strict=True), vocab_size))
    late = late_tokens([rows[i] for i in members], unread)
    pairs = [(j, *pair) for j, (_, then) in enumerate(found) for pair in then if 0 <= pair[1] < vocab_size]
    if late is None or not pairs:
        return barred
    member, before, last = np.array(pairs, dtype=np.int32).T
    met = late[mx.array(member)] == mx.array(before)
    where = Cells(np.array(members, dtype=np.int32)[member], last)
    # The lower one of what is there and this: words that end alike share a cell.
    return barred.at[where.index].minimum(mx.where(met, -mx.inf, mx.inf))


def hold_back_stops(logits: mx.array, rows: Sequence[SamplingRow], structured: Collection[str]) -> mx.array:
    """Bar the stop tokens of rows shorter than `min_tokens`.

    A grammar may admit nothing but a stop token; requests named in `structured` then keep it, as in vLLM, for otherwise
    nothing would be left to draw.
    """
    short = [(i, row) for i, row in enumerate(rows) if row.num_output_tokens < row.params.min_tokens]
    stops = cells(((i, row.params.stop_token_ids) for i, row in short), logits.shape[-1])
    masked = _bar(logits, stops)
    if not any(row.request_id in structured for _, row in short):
        return masked
    own = cells(((i, row.params.stop_token_ids) for i, row in short if row.request_id in structured), logits.shape[-1])
    dead = mx.max(masked, axis=-1)[mx.array(own.rows)] == -mx.inf
    return _set(masked, own, mx.where(dead, logits[own.index], -mx.inf)) if own.rows.size else masked


def add_bias(logits: mx.array, rows: Sequence[SamplingRow]) -> mx.array:
    """Add `logit_bias`."""
    biased = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    where = cells(biased, logits.shape[-1])
    if not where.rows.size:
        return logits
    bias = [
        rows[i].params.logit_bias[token] for i, token in zip(where.rows.tolist(), where.tokens.tolist(), strict=True)
    ]
    return logits.at[where.index].add(mx.array(bias, dtype=mx.float32))


def _completions(row: SamplingRow) -> tuple[set[int], set[tuple[int, int]]]:
    """Tokens that would complete one of the row's bad words; and (a, b) where b would if the row's last token, which is
    still on the device, is a."""
    output = row.output_token_ids
    barred: set[int] = set()
    barred_after: set[tuple[int, int]] = set()
    for word in row.params.bad_words:
        *before, last = word
        if not before or (row.late is None and _ends(output, before)):
            barred.add(last)
        elif row.late is not None and _ends(output[:-1], before[:-1]):
            barred_after.add((before[-1], last))
    return barred, barred_after


def _ends(tokens: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(wanted) <= len(tokens) and list(tokens[len(tokens) - len(wanted) :]) == list(wanted)


def _bar(logits: mx.array, where: Cells) -> mx.array:
    return _set(logits, where, mx.array(-mx.inf)) if where.rows.size else logits


def _set(logits: mx.array, where: Cells, values: mx.array) -> mx.array:
    """A copy of `logits` with the cells replaced: `__setitem__` rebinds its target, so the argument keeps its value."""
    changed = mx.array(logits)
    changed[where.index] = values
    return changed
