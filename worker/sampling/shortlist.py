"""The most likely tokens of each row, in order, without sorting the vocabulary.

    logits (G, V) --> top `size` ids and values --> which of them top-k, top-p and min-p keep --> draw

The kept set of any of these filters is a prefix of the order by likelihood, so a shortlist that reaches past its end
is exact. `filter_shortlist` also says whether it did; if not, the caller filters the whole row (`full_row`).

Definitions are vLLM's (min-p, then top-k, then top-p over what is left, renormalised):
- min-p keeps tokens with p >= min_p * max p;
- top-k keeps tokens at least as likely as the k-th: all of those that tie with it;
- top-p keeps a token if those before it hold less than top_p. Where tied tokens straddle that end vLLM keeps an
  arbitrary part of them (its sort is not stable); here lower ids come first.
"""

import mlx.core as mx

from pomarium.worker.sampling.draw import pick

_STRIDE = 16
MINIMUM = 256


def shortlist_size(top_k: int, vocab_size: int) -> int:
    """Tokens to list for a request with this top_k (0 for none): a power of two that shows ties with the k-th token."""
    wanted = max(MINIMUM, 1 << (top_k + top_k // 8).bit_length())
    return min(vocab_size, wanted)


def most_likely(logits: mx.array, size: int) -> tuple[mx.array, mx.array]:
    """Ids uint32 and values of the `size` largest of each row of float32 (G, V), descending, ties by lower id.

    Which of the tokens tied for the last place is listed is unspecified.
    """
    vocab_size = logits.shape[-1]
    if size < vocab_size:
        ids = mx.sort(_unordered(logits, size), axis=-1)
        values = mx.take_along_axis(logits, ids, axis=-1)
        order = mx.argsort(-values, axis=-1)
        return mx.take_along_axis(ids, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
    ids = mx.argsort(-logits, axis=-1)
    return ids, mx.take_along_axis(logits, ids, axis=-1)


def filter_shortlist(
    values: mx.array, top_k: mx.array, top_p: mx.array, min_p: mx.array, mass: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Weights (G, S) of the shortlisted tokens, 0 for those filtered out, and whether the kept set ends within, (G,).

    Args:
        values: logits over temperature, descending, float32 (G, S).
        top_k: int32 (G, 1) in 1..S; S keeps every token. top_p, min_p: float32 (G, 1).
        mass: sum over the whole vocabulary of exp(logit - max), float32 (G, 1), for rows that have only top_p; None for
            rows whose top_k or min_p bounds the set, whose mass is that of the tokens these keep.
    """
    weights = mx.exp(values - values[:, :1])
    weights = mx.where(weights > 0, weights, mx.zeros_like(weights))
    kth = mx.take_along_axis(values, top_k - 1, axis=-1)
    weights = weights * mx.logical_and(weights >= min_p, values >= kth)
    bounded = weights[:, -1] == 0
    total = mx.sum(weights, axis=-1, keepdims=True) if mass is None else mass
    before = mx.cumsum(weights, axis=-1, inclusive=False)
    weights = weights * mx.logical_or(before < top_p * total, top_p >= 1)
    return weights, (bounded if mass is None else weights[:, -1] == 0)


def draw_shortlisted(ids: mx.array, weights: mx.array, uniform: mx.array) -> mx.array:
    """Token ids (G,) drawn from shortlists (G, S) by `uniform` (G, 1); 0 where no token has weight, as vLLM."""
    chosen = mx.take_along_axis(ids, pick(weights, uniform)[:, None], axis=-1)[:, 0]
    return mx.where(weights[:, 0] > 0, chosen, mx.zeros_like(chosen))


def _unordered(logits: mx.array, size: int) -> mx.array:
    """Ids (G, size) of the largest of (G, V).

    Each of the largest lies in one of the `size` strided blocks with the largest maxima (were it in another, `size`
    tokens would be at least as large), so when V is much larger only those blocks are partitioned.
    """
    rows, vocab_size = logits.shape
    blocks = vocab_size // _STRIDE
    if 2 * size * _STRIDE > vocab_size:
        return _partition(logits, size)
    body = logits[:, : blocks * _STRIDE].reshape(rows, _STRIDE, blocks)
    chosen = _partition(mx.max(body, axis=1), size)
    offsets = mx.arange(0, blocks * _STRIDE, blocks, dtype=mx.uint32)
    rest = mx.broadcast_to(mx.arange(blocks * _STRIDE, vocab_size, dtype=mx.uint32), (rows, vocab_size % _STRIDE))
    candidates = mx.concatenate([(chosen[:, :, None] + offsets).reshape(rows, -1), rest], axis=-1)
    return mx.take_along_axis(candidates, _partition(mx.take_along_axis(logits, candidates, axis=-1), size), axis=-1)


def _partition(values: mx.array, size: int) -> mx.array:
    count = values.shape[-1]
    return mx.argpartition(values, count - size, axis=-1)[:, count - size :]
