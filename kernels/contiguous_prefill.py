"""Prompt chunks through MLX's own attention over contiguous K and V: where that is faster than tiles of 8 x 8.

    spans + block tables --plan_contiguous, once per step--> ContiguousPlan
    chunks without a cached prefix: the step's own K and V       --+--mx.fast.scaled_dot_product_attention--> outputs
    a chunk behind a cached prefix: its blocks, copied together  --+

Whole prompts of one length that stand side by side are one call.

On CUDA MLX hands this to cuDNN, which uses the tensor cores as no 8 x 8 matrix product in Metal's words can. It takes
no soft-cap, and a window only as a mask, which is bounded here; `contiguous_refusal` tells what is left to
paged_attention_prefill.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from pomarium.kernels.ordered import indices_behind, token_behind
from pomarium.kernels.paged_plan import Span
from pomarium.kernels.reference import Scoring

HEAD_DIMS = (64, 80, 96, 112, 128)
"""What cuDNN takes; for others MLX would hold all scores at once."""

MOST_MASK = 1 << 24
"""Elements of a window's mask."""


@dataclass(frozen=True)
class ContiguousSpan:
    """One chunk, or several alike.

    Attributes:
        span: the first one. count: of chunks, each as long as the first and behind the one before.
        first_key: that its first token sees; the keys are [first_key, span.context).
        blocks: int32 (num_kv_heads, B), each head's part of the blocks that hold them; None without a cached prefix.
        skip: keys of the first block before `first_key`. mask: bool (tokens, keys) if a window hides any, else None.
    """

    span: Span
    count: int
    first_key: int
    blocks: mx.array | None
    skip: int
    mask: mx.array | None


@dataclass(frozen=True)
class ContiguousPlan:
    """A step's prompt chunks. `block_size`, `num_kv_heads`: of the pool."""

    spans: tuple[ContiguousSpan, ...]
    block_size: int
    num_kv_heads: int


def contiguous_refusal(
    spans: Sequence[Span], head_dim: int, dtype: mx.Dtype, window: int | None, softcap: float | None
) -> str | None:
    """Why MLX's attention does not suit; None if it does."""
    if softcap is not None:
        return "a soft-cap"
    if dtype == mx.float32 or head_dim not in HEAD_DIMS:
        return f"head size {head_dim} of {dtype}"
    if any(_hidden(span, window) and span.tokens * span.context > MOST_MASK for span in spans):
        return f"a window of {window} over long chunks"
    return None


def plan_contiguous(
    spans: Sequence[Span], tables: Sequence[np.ndarray], num_kv_heads: int, block_size: int, window: int | None
) -> ContiguousPlan:
    """Plan attention of prompt chunks whose tables have been checked (paged_plan.checked_tables)."""
    heads = np.arange(num_kv_heads)[:, None]
    planned: list[ContiguousSpan] = []
    for span, table in zip(spans, tables, strict=True):
        if planned and _goes_on(planned[-1], span):
            planned[-1] = replace(planned[-1], count=planned[-1].count + 1)
            continue
        first_key = span.first_key(window)
        blocks = None
        if span.tokens < span.context:
            held = table[first_key // block_size : -(-span.context // block_size)].astype(np.int64)
            blocks = mx.array((held[None] * num_kv_heads + heads).astype(np.int32))
        mask = _mask(span, first_key, window) if window is not None and _hidden(span, window) else None
        planned.append(ContiguousSpan(span, 1, first_key, blocks, first_key % block_size, mask))
    return ContiguousPlan(tuple(planned), block_size, num_kv_heads)


def _goes_on(part: ContiguousSpan, span: Span) -> bool:
    """Whether `span` is one more of `part`: a whole prompt as they are, in the rows behind theirs."""
    first = part.span
    whole = part.blocks is None and (span.tokens, span.context) == (first.tokens, first.context)
    return whole and span.first_token == first.first_token + part.count * first.tokens


def _hidden(span: Span, window: int | None) -> bool:
    """Whether the window hides keys from a token that an earlier one sees."""
    return window is not None and span.tokens > 1 and span.context > window


def _mask(span: Span, first_key: int, window: int) -> mx.array:
    query = np.arange(span.context - span.tokens, span.context)[:, None]
    key = np.arange(first_key, span.context)[None]
    return mx.array((key <= query) & (key > query - window))


def contiguous_prefill(
    plan: ContiguousPlan,
    rows: tuple[mx.array, mx.array, mx.array],
    pool: tuple[mx.array, ...],
    scoring: Scoring,
    after: mx.array,
) -> tuple[mx.array, mx.array]:
    """Attention of the plan's chunks.

    Args:
        rows: the step's queries (T, num_heads, head_dim), keys and values (T, num_kv_heads, head_dim).
        pool: keys and values, (rows, head_dim) each. after: token int32 (1,) of the pool's last access.

    Returns:
        (tokens of the chunks, num_heads, head_dim), one chunk after another, and the token of this access.
    """
    outputs, token = [], after
    sinks = None if scoring.sinks is None else scoring.sinks.astype(rows[0].dtype)
    for part in plan.spans:
        queries, keys, values = (_chunks(array, part) for array in rows)
        if part.blocks is not None:
            ordered = indices_behind(part.blocks, after)
            keys, values = (_gather(array, ordered, part, plan.block_size) for array in pool)
            token = token_behind(token_behind(token, keys), values)
        out = mx.fast.scaled_dot_product_attention(
            queries,
            keys,
            values,
            scale=scoring.scale,
            mask="causal" if part.mask is None else part.mask,
            sinks=sinks,
        )
        outputs.append(out.swapaxes(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs), token


def _chunks(array: mx.array, part: ContiguousSpan) -> mx.array:
    """(count, heads, tokens, head_dim) out of a step's rows."""
    first, tokens = part.span.first_token, part.span.tokens
    rows = array[first : first + part.count * tokens]
    return rows.reshape(part.count, tokens, *rows.shape[1:]).swapaxes(1, 2)


def _gather(array: mx.array, blocks: mx.array, part: ContiguousSpan, block_size: int) -> mx.array:
    """(1, num_kv_heads, keys, head_dim) copied out of a pool."""
    heads, count = blocks.shape
    width = array.shape[-1]
    copied = mx.take(array.reshape(-1, block_size * width), blocks, axis=0).reshape(heads, count * block_size, width)
    keys = part.span.context - part.first_key
    return copied[None, :, part.skip : part.skip + keys]
