"""Inverse-CDF draws from unnormalised weights.

A running sum over a whole vocabulary in float32 would lose small weights behind large sums. So a row is drawn in two
levels, block by weight of block and then token within it, each with a uniform of its own: sums run over at most a few
hundred terms, and P(block) P(token | block) is exact up to their rounding and the 24 bits of each uniform.
"""

import mlx.core as mx

_BLOCK = 256


def pick(weights: mx.array, uniform: mx.array) -> mx.array:
    """Index (G,) of one entry per row, probability proportional to `weights` (G, N), for `uniform` (G, 1) in [0, 1).

    Entries with weight 0 or NaN are never picked, even where a parallel scan's rounding makes the running sum dip;
    if a row has no positive weight at all the answer is 0.
    """
    positive = weights > 0
    weights = mx.where(positive, weights, mx.zeros_like(weights))
    cumulative = mx.cumsum(weights, axis=-1)
    hits = mx.logical_and(cumulative > uniform * cumulative[:, -1:], positive)
    return mx.where(mx.any(hits, axis=-1), mx.argmax(hits, axis=-1), mx.argmax(weights, axis=-1))


def pick_in_blocks(weights: mx.array, uniforms: mx.array) -> mx.array:
    """`pick` over a whole vocabulary: weights (G, V), uniforms (G, 2), index (G,) below V."""
    rows, vocab_size = weights.shape
    if padding := -vocab_size % _BLOCK:
        weights = mx.pad(weights, [(0, 0), (0, padding)])
    blocks = weights.reshape(rows, -1, _BLOCK)
    block = pick(mx.sum(blocks, axis=-1), uniforms[:, :1])
    within = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * _BLOCK + pick(within, uniforms[:, 1:])
