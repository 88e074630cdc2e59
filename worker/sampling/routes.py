"""How rows are drawn once their logits are edited: by argmax, over the whole vocabulary or from a shortlist.

    logits (R, V), parameters, random bits --route--> groups of rows --> lazy draws --one mx.eval--> token ids

The route depends on the request's parameters alone, never on the batch, so a seeded request draws the same token in any
company; a row pays for its own route only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.draw import pick_in_blocks
from pomarium.worker.sampling.full_row import KeptSet, keep
from pomarium.worker.sampling.shortlist import draw_shortlisted, filter_shortlist, most_likely, shortlist_size
from pomarium.worker.sampling.uniforms import uniform, uniform_pairs
from pomarium.worker.sampling.weights import exp_shifted, row_groups
from pomarium.worker.sampling_params import SamplingParams


@dataclass(frozen=True)
class Route:
    """How a row is drawn. shortlist: tokens to list, 0 for none. mass: whether top_p needs the whole row's mass."""

    greedy: bool = False
    shortlist: int = 0
    mass: bool = False


@dataclass(frozen=True)
class Draws:
    """A group's lazy results: token ids (G,) and, if shortlists may have been too short, which sufficed (G,)."""

    rows: list[int]
    token_ids: mx.array
    complete: mx.array | None = None


def route(params: SamplingParams, vocab_size: int) -> Route:
    """The route of a request: a function of its parameters only."""
    if params.greedy:
        return Route(greedy=True)
    bounded = 0 < params.top_k < vocab_size
    if not bounded and params.top_p >= 1:
        return Route()
    size = shortlist_size(params.top_k if bounded else 0, vocab_size)
    return Route(shortlist=size, mass=not bounded and params.min_p <= 0 and size < vocab_size)


def draw_tokens(logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray) -> list[int]:
    """Tokens of rows whose logits need only temperature, min_p, top_k and top_p."""
    draws = _draws(logits, params, bits)
    mx.eval([d.token_ids for d in draws], [d.complete for d in draws if d.complete is not None])

    token_ids = np.zeros(len(params), dtype=np.int64)
    for draw in draws:
        token_ids[draw.rows] = np.array(draw.token_ids)
        if draw.complete is not None:
            for j in np.flatnonzero(~np.array(draw.complete)):
                i = draw.rows[j]
                token_ids[i] = _keep(np.asarray(logits)[i], params[i]).draw(uniform(int(bits[i])))
    return [int(token) for token in token_ids]


def draw_on_device(logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray) -> mx.array:
    """The same, int32 (R,) and lazily: nothing is looked at on the host.

    Where a shortlist may be too short the whole row is sorted beside it, in float32 instead of `draw_tokens`' float64.
    With a top_k none is, but for ties with the k-th token that outnumber the list: of those the listed ones count.
    """
    vocab_size = logits.shape[-1]
    rows: list[int] = []
    drawn: list[mx.array] = []
    for draw in _draws(logits, params, bits):
        tokens, own = draw.token_ids, [params[i] for i in draw.rows]
        if draw.complete is not None and not all(0 < p.top_k < vocab_size for p in own):
            every = Route(shortlist=vocab_size)
            whole = _draw_shortlist(_select(logits, draw.rows), own, bits[draw.rows], every, draw.rows)
            tokens = mx.where(draw.complete, tokens, whole.token_ids)
        rows += draw.rows
        drawn.append(tokens.astype(mx.int32))
    joined = drawn[0] if len(drawn) == 1 else mx.concatenate(drawn)
    return joined if rows == list(range(len(rows))) else joined[mx.array(np.argsort(rows).astype(np.int32))]


def _draws(logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray) -> list[Draws]:
    """Of all rows, route by route."""
    members: dict[Route, list[int]] = {}
    for i, row in enumerate(params):
        members.setdefault(route(row, logits.shape[-1]), []).append(i)
    return [draw for way, indices in members.items() for draw in _draw(logits, params, bits, way, indices)]


def _draw(
    logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray, way: Route, indices: list[int]
) -> list[Draws]:
    if way.greedy:
        return [Draws(indices, mx.argmax(_select(logits, indices), axis=-1))]
    draw = _draw_shortlist if way.shortlist else _draw_whole
    groups = row_groups(indices, logits.shape[-1]) if way.mass or not way.shortlist else [indices]
    return [draw(_select(logits, group), [params[i] for i in group], bits[group], way, group) for group in groups]


def _draw_whole(
    logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray, way: Route, rows: list[int]
) -> Draws:
    weights, _ = exp_shifted(_cool(logits, params))
    if any(p.min_p > 0 for p in params):
        weights = weights * (weights >= _column([p.min_p for p in params]))
    return Draws(rows, pick_in_blocks(weights, mx.array(uniform_pairs(bits))))


def _draw_shortlist(
    logits: mx.array, params: Sequence[SamplingParams], bits: np.ndarray, way: Route, rows: list[int]
) -> Draws:
    ids, values = most_likely(logits, way.shortlist)
    mass = mx.sum(exp_shifted(_cool(logits, params))[0], axis=-1, keepdims=True) if way.mass else None
    top_k = [p.top_k if 0 < p.top_k < way.shortlist else way.shortlist for p in params]
    weights, complete = filter_shortlist(
        _cool(values, params),
        mx.array(top_k, dtype=mx.int32)[:, None],
        _column([p.top_p for p in params]),
        _column([p.min_p for p in params]),
        mass,
    )
    tokens = draw_shortlisted(ids, weights, mx.array(uniform_pairs(bits)[:, :1]))
    return Draws(rows, tokens, None if way.shortlist == logits.shape[-1] else complete)


def draw_and_mask(logits: np.ndarray, params: SamplingParams, bits: np.uint64) -> tuple[int, np.ndarray]:
    """Token of one row float32 (V,), and the row over temperature with what the filters removed at -inf, float32 (V,).

    On the host, so that both come from one kept set.
    """
    if params.greedy:
        return int(np.argmax(logits)), logits
    kept = _keep(logits, params)
    return kept.draw(uniform(int(bits))), kept.masked()


def _keep(logits: np.ndarray, params: SamplingParams) -> KeptSet:
    return keep(logits / np.float32(params.temperature), params.top_k, params.top_p, params.min_p)


def _select(logits: mx.array, indices: list[int]) -> mx.array:
    if len(indices) == logits.shape[0]:
        return logits
    if indices[-1] - indices[0] + 1 == len(indices):
        return logits[indices[0] : indices[-1] + 1]
    return logits[mx.array(indices)]


def _cool(logits: mx.array, params: Sequence[SamplingParams]) -> mx.array:
    """Divide by temperature, as vLLM does: multiplying by the inverse rounds differently."""
    if all(p.temperature == 1 for p in params):
        return logits
    return logits / _column([p.temperature for p in params])


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(list(values), dtype=mx.float32)[:, None]
