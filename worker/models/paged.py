"""An mlx-lm model made ready for the paged cache: what its layers keep, and one call from rows to logits.

    nn.Module --prepare--> PagedModel.layers --(vLLM)--> pool --PagedModel(rows, StepAttention)--> logits

`prepare` finds the facts by asking the model: the kinds of cache it makes tell the windows, and a lazy dry run of two
rows, which computes nothing, tells K's and V's shapes and that every layer attends through the seam exactly once. What
fails is refused by name.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.models.inline_attention import reroute_inline_attention
from pomarium.worker.models.rows import HeadRows, RowCache, route_attention

WAY_OUT = "set VLLM_METAL_USE_PAGED_ATTENTION=0 to run it with mlx-lm's contiguous cache"


@dataclass(frozen=True)
class PagedModel:
    """A model whose attention goes through StepAttention.

    Attributes:
        layers: indexed by cache entry. vocab_size: width of the logits. dtype: of K and V.
    """

    module: nn.Module
    layers: tuple[LayerCache, ...]
    vocab_size: int
    dtype: mx.Dtype
    head: HeadRows

    def __call__(self, token_ids: np.ndarray, positions: np.ndarray, step: StepAttention, rows: np.ndarray) -> mx.array:
        """Logits (N, vocab_size) of the rows int32 (N,) of T rows int32 (T,) each of token ids and positions."""
        offset = mx.array(positions)
        caches = [RowCache(index, layer.window, offset, step) for index, layer in enumerate(self.layers)]
        logits = self.head.run(self.module, mx.array(token_ids)[:, None], caches, mx.array(rows))
        return logits[:, 0]


@dataclass
class _DryRun:
    """A StepAttention that records what each layer brings."""

    seen: dict[int, tuple[tuple[int, ...], tuple[int, ...], mx.Dtype]]

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        if layer in self.seen:
            raise UnsupportedError(f"layer {layer} attends twice in a step")
        self.seen[layer] = (keys.shape, values.shape, keys.dtype)
        return mx.zeros((*queries.shape[:2], values.shape[-1]), queries.dtype)


def prepare(module: nn.Module, model_type: str) -> PagedModel:
    """Make `module` (mlx-lm's, loaded) run over a paged cache.

    Raises:
        UnsupportedError: names `model_type`, what of it does not fit, and the flag to change.
    """
    windows = [_window(cache, model_type) for cache in make_prompt_cache(module)]
    route_attention(module)
    reroute_inline_attention(module)
    head = HeadRows(module)
    dry = _DryRun({})
    offset = mx.array([0, 1], mx.int32)
    caches = [RowCache(index, window, offset, dry) for index, window in enumerate(windows)]
    try:
        logits = head.run(module, mx.zeros((2, 1), mx.int32), caches, mx.array([1], mx.int32))
    except UnsupportedError as error:
        raise _refusal(model_type, str(error)) from error
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise _refusal(model_type, f"it does not run row by row ({type(error).__name__}: {error})") from error
    if missing := [str(index) for index in range(len(windows)) if index not in dry.seen]:
        raise _refusal(model_type, f"layers {', '.join(missing)} do not attend through scaled_dot_product_attention")
    layers = []
    for index, window in enumerate(windows):
        keys, values, _ = dry.seen[index]
        if keys != values:
            raise _refusal(model_type, f"layer {index} caches keys {keys[1:]} and values {values[1:]} of unequal shape")
        layers.append(LayerCache(keys[1], keys[2], window))
    if logits.shape[:2] != (1, 1):
        raise _refusal(model_type, f"its logits have shape {logits.shape} instead of one row per token")
    return PagedModel(module, tuple(layers), logits.shape[-1], dry.seen[0][2], head)


def _window(cache: KVCache | RotatingKVCache, model_type: str) -> int | None:
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise _refusal(model_type, f"it keeps a {type(cache).__name__}, which the paged cache does not hold")


def _refusal(model_type: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"model type {model_type!r} does not run on the paged KV cache: {reason}; {WAY_OUT}")
