"""min-p, top-k and top-p of one whole row on the host, in float64: the reference for `shortlist`, and the way for rows
whose kept set is longer than their shortlist (flat distributions) or whose processed logits were asked for.

Only values are sorted (numpy sorts float32 with vector instructions, about 0.3 ms for 49152 of them); ids come back by
looking for the value that was drawn.
"""

from dataclasses import dataclass

import numpy as np

_HEAD = 8192


@dataclass(frozen=True)
class KeptSet:
    """The tokens of a row that its filters keep.

    Attributes:
        logits: the row, over temperature, float32 (V,).
        weights: unnormalised probabilities of the kept tokens, descending, float64 (n,).
        values: their logits, float32 (n,).
    """

    logits: np.ndarray
    weights: np.ndarray
    values: np.ndarray

    def draw(self, uniform: float) -> int:
        """The token at `uniform` in [0, 1) of the kept mass; 0 if nothing is kept, as vLLM."""
        if not self.weights.size:
            return 0
        cumulative = np.cumsum(self.weights)
        index = int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))
        value = self.values[min(index, self.weights.size - 1)]
        first = int(np.count_nonzero(self.values > value))
        return int(np.flatnonzero(self.logits == value)[min(index, self.weights.size - 1) - first])

    def masked(self) -> np.ndarray:
        """The row with -inf for every token that is not kept, float32 (V,)."""
        masked = np.full_like(self.logits, -np.inf)
        if self.values.size:
            last = self.values[-1]
            ties = np.flatnonzero(self.logits == last)[: np.count_nonzero(self.values == last)]
            kept = np.concatenate([np.flatnonzero(self.logits > last), ties])
            masked[kept] = self.logits[kept]
        return masked


def keep(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> KeptSet:
    """Filter a row of logits over temperature, float32 (V,); top_k 0 keeps every token. NaN counts as -inf."""
    maximum = logits.max()
    if not np.isfinite(maximum):
        logits = np.nan_to_num(logits, nan=-np.inf, posinf=float(np.finfo(np.float32).max), neginf=-np.inf)
        maximum = logits.max()
    if maximum == -np.inf:
        return KeptSet(logits, np.zeros(0), logits[:0])
    if logits.size > _HEAD:
        # Most kept sets end within the head, which costs a quarter of a sorted row.
        head = np.sort(np.partition(logits, logits.size - _HEAD)[logits.size - _HEAD :])[::-1]
        weights, bounded = _bound(head, top_k, min_p)
        if bounded or min_p <= 0:
            mass = weights.sum() if bounded else np.exp(logits - maximum).sum(dtype=np.float64)
            weights = _nucleus(weights, top_p, mass)
            if bounded or weights.size < _HEAD:
                return KeptSet(logits, weights, head[: weights.size])
    values = np.sort(logits)[::-1]
    weights, _ = _bound(values, top_k, min_p)
    weights = _nucleus(weights, top_p, weights.sum())
    return KeptSet(logits, weights, values[: weights.size])


def _bound(values: np.ndarray, top_k: int, min_p: float) -> tuple[np.ndarray, bool]:
    """float64 weights of the prefix of descending `values` that min_p and top_k keep; True if it ends before them."""
    weights = np.exp(values.astype(np.float64) - np.float64(values[0]))
    count = int(np.count_nonzero((weights >= min_p) & (values > -np.inf)))
    if 0 < top_k < count:
        count = int(np.count_nonzero(values[:count] >= values[top_k - 1]))
    return weights[:count], count < values.size


def _nucleus(weights: np.ndarray, top_p: float, mass: float) -> np.ndarray:
    """The prefix of descending `weights` that top_p keeps, of a total of `mass`."""
    if top_p >= 1:
        return weights
    kept: np.ndarray = weights[np.cumsum(weights) - weights < top_p * mass]
    return kept
