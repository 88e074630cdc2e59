"""Models that compute attention inline instead of calling `scaled_dot_product_attention`: their call, rerouted.

Only the call is ours: projections, norms and weights stay mlx-lm's objects. Gemma 2 (mlx_lm/models/gemma2.py) caps its
scores, which mlx-lm's function cannot. With any other cache than a RowCache the original call runs.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gemma2

from pomarium.kernels.reference import Scoring
from pomarium.worker.models.rows import RowCache


class Gemma2RowAttention(gemma2.Attention):
    """Gemma 2's attention over a RowCache: grouped-query attention with soft-capped scores."""

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        """x: (T, 1, hidden); the same shape out."""
        if not isinstance(cache, RowCache):
            original: mx.array = super().__call__(x, mask, cache)
            return original
        rows, length, _ = x.shape
        queries, keys, values = (
            projection(x).reshape(rows, length, heads, self.head_dim).transpose(0, 2, 1, 3)
            for projection, heads in (
                (self.q_proj, self.n_heads),
                (self.k_proj, self.n_kv_heads),
                (self.v_proj, self.n_kv_heads),
            )
        )
        queries, keys = self.rope(queries, offset=cache.offset), self.rope(keys, offset=cache.offset)
        keys, values = cache.update_and_fetch(keys, values)
        out = cache.attend(queries, keys, values, Scoring(self.scale, softcap=self.attn_logit_softcapping))
        projected: mx.array = self.o_proj(out.transpose(0, 2, 1, 3).reshape(rows, length, -1))
        return projected


def reroute_inline_attention(model: nn.Module) -> None:
    """Give the attention modules that compute inline their rerouted call. Idempotent."""
    for module in model.modules():
        if type(module) is gemma2.Attention:
            module.__class__ = Gemma2RowAttention
