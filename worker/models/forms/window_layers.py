"""A built model made to keep to windows that mlx-lm's definition does not have.

    model, a window or None per layer (windows.py) --keep_windows--> masks and caches

Only the mask that a layer is given and the kind of its cache differ. Rows over the paged pool get their windows from
the kind of cache (models.paged), so they need no more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache, RotatingKVCache


def keep_windows(model: nn.Module, windows: Sequence[int | None]) -> None:
    """Let layer i of `model` attend to its last `windows[i]` tokens, on any cache and without one."""
    layers: list[Any] = list(model.layers)
    for layer, window in zip(layers, windows, strict=True):
        layer.__class__ = _within(type(layer), window)

    def make_cache(_: nn.Module) -> list[KVCache | RotatingKVCache]:
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for window in windows]

    model.__class__ = type(type(model).__name__, (type(model),), {"make_cache": make_cache})


def _within(layer_class: type[nn.Module], window: int | None) -> type[nn.Module]:
    """A layer that makes its mask of its own cache; models make one of their first layer's for all."""
    forward: Callable[..., mx.array] = layer_class.__call__

    def call(layer: nn.Module, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        as_array = isinstance(mask, mx.array)
        return forward(layer, x, create_attention_mask(x, cache, window_size=window, return_array=as_array), cache)

    return type(layer_class.__name__, (layer_class,), {"__call__": call, "__module__": layer_class.__module__})
