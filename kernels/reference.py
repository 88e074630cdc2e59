"""MLX-operation references of the kernels: the same mathematics, on any device, without a kernel.

They define what a kernel computes, serve the CPU device, and take over on a GPU where a kernel does not fit a shape.
"""

from dataclasses import dataclass

import mlx.core as mx

MASKED = -1e30
"""Added to the scores of keys that a query does not see. Finite, so that a fully masked (padded) row gives no NaN."""


@dataclass(frozen=True)
class Scoring:
    """How a layer turns products of queries and keys into scores.

    Attributes:
        scale: factor on the products.
        sinks: (num_heads,), logits of a key without a value (GPT-OSS).
        softcap: scores become softcap x tanh(scores / softcap) (Gemma 2).
    """

    scale: float
    sinks: mx.array | None = None
    softcap: float | None = None


def grouped_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    bias: mx.array,
    scoring: Scoring,
) -> mx.array:
    """Attention of S padded sequences with Q queries over L keys each, softmax in float32.

    The query heads of a group are folded into the query axis, so that K and V are read once per KV head.

    Args:
        queries: (S x Q, num_heads, head_dim). keys: (S, num_kv_heads, L, head_dim). values: (S, num_kv_heads, L,
            value_dim).
        bias: (S, 1, 1, Q, L), added to the scores.

    Returns:
        (S x Q, num_heads, value_dim) of the queries' dtype.
    """
    sequences, kv_heads, length, head_dim = keys.shape
    count, group = bias.shape[3], queries.shape[1] // kv_heads
    q = (queries * scoring.scale).reshape(sequences, count, kv_heads, group, head_dim).transpose(0, 2, 3, 1, 4)
    scores = q.reshape(sequences, kv_heads, group * count, head_dim) @ keys.swapaxes(-1, -2)
    if scoring.softcap is not None:
        scores = mx.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.reshape(sequences, kv_heads, group, count, length) + bias.astype(scores.dtype)
    if scoring.sinks is not None:
        column = scoring.sinks.astype(scores.dtype).reshape(1, kv_heads, group, 1, 1)
        column = mx.broadcast_to(column, (sequences, kv_heads, group, count, 1))
        weights = mx.softmax(mx.concatenate([column, scores], axis=-1), axis=-1, precise=True)[..., 1:]
    else:
        weights = mx.softmax(scores, axis=-1, precise=True)
    out = weights.reshape(sequences, kv_heads, group * count, length) @ values
    out = out.reshape(sequences, kv_heads, group, count, values.shape[-1]).transpose(0, 3, 1, 2, 4)
    return out.reshape(sequences * count, queries.shape[1], values.shape[-1])
