"""Running an unmodified mlx-lm model over a ragged batch: T tokens as T rows of length one.

    RowCache (per layer and step) --as mlx-lm's cache--> model(token_ids[:, None], cache) --> StepAttention.attend

An mlx-lm model sees a batch of T sequences of one token. RoPE takes each row's position from `cache.offset`, an array;
masks are None; and where the model calls `scaled_dot_product_attention`, the call goes to the step's attention if the
cache is a RowCache, and to mlx-lm's own function otherwise, so that the same model object still runs mlx-lm's way.
"""

import sys
from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.errors import UnsupportedError

_ATTENTION = "scaled_dot_product_attention"


class RowCache:
    """What a layer gets as its cache: positions to rotate by, and the way to the paged pool.

    Attributes:
        offset: int32 (T,), position of each row (mlx-lm's name for it).
    """

    def __init__(self, layer: int, window: int | None, offset: mx.array, step: StepAttention) -> None:
        self.offset = offset
        self._layer = layer
        self._window = window
        self._step = step

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """mlx-lm's place to store (T, kv_heads, 1, head_dim); `attend` stores them, with what it then reads."""
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None) -> None:
        """No mask: causality and window are the attention's.

        Raises:
            UnsupportedError: if the model masks with a window that its own cache does not have.
        """
        if window_size is not None and self._window is not None and window_size != self._window:
            raise UnsupportedError(f"layer {self._layer} masks {window_size} tokens but caches {self._window}")

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """(T, heads, 1, head_dim) in and (T, heads, 1, value_dim) out, as mlx-lm lays out one token."""
        q, k, v = (array.squeeze(2) for array in (queries, keys, values))
        out: mx.array = self._step.attend(self._layer, q, k, v, scoring)
        return out[:, :, None]

    def reader(self) -> "RowCache":
        """The cache of a layer that attends over what this one's layer keeps, and keeps nothing itself."""
        return _Reader(self._layer, self._window, self.offset, self._step)

    def attend_latents(self, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """See StepAttention.attend_latents."""
        return self._step.attend_latents(self._layer, queries, latents, rank, scoring)


class _Reader(RowCache):
    """See RowCache.reader."""

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """As RowCache.attend; the owner has stored `keys` and `values`."""
        q, k, v = (array.squeeze(2) for array in (queries, keys, values))
        return self._step.attend_shared(self._layer, q, k, v, scoring)[:, :, None]


def _dispatching_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: object,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    if isinstance(cache, RowCache):
        return cache.attend(queries, keys, values, Scoring(scale, sinks))
    original: mx.array = base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    return original


def route_attention(model: nn.Module) -> None:
    """Let the attention calls of `model`'s modules go by the kind of cache. Idempotent."""
    for module in model.modules():
        namespace = vars(sys.modules[type(module).__module__])
        if namespace.get(_ATTENTION) is base.scaled_dot_product_attention:
            namespace[_ATTENTION] = _dispatching_attention


class HeadRows:
    """Cuts a model's hidden states down to the rows whose logits are wanted, between its last norm and its head.

    The head is the largest product of a small model, and a prompt chunk needs one of its rows. mlx-lm computes all, so
    the inner module, the one that owns the layers, gets a one-off subclass whose call keeps only `rows`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._rows: mx.array | None = None
        inner = _owner_of_layers(model)
        self._installed = inner is not None and inner is not model
        if inner is not None and inner is not model:
            base_class = type(inner)
            forward: Callable[..., mx.array] = base_class.__call__

            def call(module: nn.Module, *args: object, **kwargs: object) -> mx.array:
                hidden = forward(module, *args, **kwargs)
                return hidden if self._rows is None else hidden[self._rows]

            inner.__class__ = type(base_class.__name__, (base_class,), {"__call__": call})

    def run(
        self,
        model: nn.Module,
        token_ids: mx.array,
        cache: Sequence[object],
        rows: mx.array,
        embeddings: mx.array | None = None,
    ) -> mx.array:
        """model(token_ids, cache) with only `rows` (int32 (N,)) of its first axis in the result.

        Args:
            embeddings: (T, 1, hidden_size), taken for those of `token_ids`.
        """
        self._rows = rows
        given = {} if embeddings is None else {"input_embeddings": embeddings}
        try:
            logits: mx.array = model(token_ids, cache=cache, **given)
            return logits if self._installed else logits[rows]
        finally:
            self._rows = None


def _owner_of_layers(model: nn.Module) -> nn.Module | None:
    owners = [module for module in model.modules() if "layers" in module]
    return owners[0] if len(owners) == 1 else None
