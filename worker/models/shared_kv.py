"""Layers that attend over another layer's K and V (Gemma 4, mlx_lm/models/gemma4_text.py): their call, rerouted.

    owner: Attention(x, cache: RowCache) --attend--> the pool        hands on SharedRows(reader, K, V)
    later: Attention(x, shared_kv: SharedRows) --attend_shared--> the owner's place in the pool

mlx-lm's layers hand on what the attention call is to see: all K and V so far. Over rows these are the step's own only,
and the rest is in the pool, so what is handed on also says where. The model passes it through unread. Projections,
norms and rope are mlx-lm's; with any other cache than a RowCache the original call runs.
"""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma4_text

from pomarium.worker.models.rows import RowCache

Returned = tuple[mx.array, object, mx.array | None]
"""Output, what is handed on in place of (K, V), and the positions."""


@dataclass(frozen=True)
class SharedRows:
    """K and V of the step's rows, (T, kv_heads, 1, head_dim) each, and the way to those cached before."""

    cache: RowCache
    keys: mx.array
    values: mx.array


class Gemma4RowAttention(gemma4_text.Attention):
    """Gemma 4's attention over a RowCache, its own or another layer's."""

    def __call__(
        self,
        x: mx.array,
        mask: mx.array | None = None,
        cache: object = None,
        shared_kv: object = None,
        offset: mx.array | None = None,
    ) -> Returned:
        """x: (T, 1, hidden); the first of what it returns has the same shape."""
        if isinstance(cache, RowCache):
            output, (keys, values), offset = super().__call__(x, mask, cache)
            return output, SharedRows(cache.reader(), keys, values), offset
        if isinstance(shared_kv, SharedRows):
            rows = (shared_kv.keys, shared_kv.values)
            output, _, offset = super().__call__(x, mask, shared_kv.cache, rows, offset)
            return output, shared_kv, offset
        original: Returned = super().__call__(x, mask, cache, shared_kv, offset)
        return original


def reroute_shared_attention(model: nn.Module) -> None:
    """Give the attention modules that may share K and V their rerouted call. Idempotent."""
    for module in model.modules():
        if type(module) is gemma4_text.Attention:
            module.__class__ = Gemma4RowAttention
