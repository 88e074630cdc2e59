"""Absorbed multi-head latent attention (mlx_lm/models/deepseek_v3.py, glm4_moe_lite.py) over rows: its call, rerouted.

    x --mlx-lm's own projections, norms, rope--> queries in the latents' space --RowCache.attend_latents--> W_UV, W_O

mlx-lm caches each token's latent and rotated key, and adds the rotated keys' part of the scores as a mask, before the
attention call and over its own cache. Over the paged pool both parts are one product: queries and latents are put
beside their rotated parts, and the values are the latents. With any other cache than a RowCache the original call runs.

mlx-lm absorbs W_UK into the query for one token and expands the latents for several; rows are always absorbed.
Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1 and appendix C.
"""

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v3, glm4_moe_lite

from pomarium.kernels.reference import Scoring
from pomarium.worker.models.rows import RowCache


class _Absorbed(nn.Module):
    """The rerouted call, over the attributes that mlx-lm's absorbed attention modules have in common."""

    num_heads: int
    q_lora_rank: int | None
    q_head_dim: int
    qk_nope_head_dim: int
    kv_lora_rank: int
    scale: float

    def __call__(self, x: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        """x: (T, 1, hidden); the same shape out."""
        if not isinstance(cache, RowCache):
            original: mx.array = super().__call__(x, mask, cache)
            return original
        rows = x.shape[0]
        queries = self.q_proj(x) if self.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        queries = queries.reshape(rows, 1, self.num_heads, self.q_head_dim).transpose(0, 2, 1, 3)
        plain, rotated = mx.split(queries, [self.qk_nope_head_dim], axis=-1)
        latent, key = mx.split(self.kv_a_proj_with_mqa(x), [self.kv_lora_rank], axis=-1)
        rotated = self.rope(rotated, cache.offset)
        key = self.rope(key[:, None], cache.offset)
        out = cache.attend_latents(
            mx.concatenate([_per_head(self.embed_q, plain.squeeze(2)), rotated.squeeze(2)], axis=-1),
            mx.concatenate([self.kv_a_layernorm(latent).squeeze(1), key.squeeze((1, 2))], axis=-1),
            self.kv_lora_rank,
            Scoring(self.scale),
        )
        projected: mx.array = self.o_proj(_per_head(self.unembed_out, out).reshape(rows, 1, -1))
        return projected


def _per_head(product: nn.Module, rows: mx.array) -> mx.array:
    """mlx-lm's MultiLinear over (T, heads, in), one product per head over all rows: (T, heads, out)."""
    out: mx.array = product(rows.transpose(1, 0, 2)[None])
    return out[0].transpose(1, 0, 2)


class DeepseekV3RowAttention(_Absorbed, deepseek_v3.DeepseekV3Attention):
    """DeepSeek-V3's attention over a RowCache."""


class Glm4MoeLiteRowAttention(_Absorbed, glm4_moe_lite.Glm4MoeLiteAttention):
    """GLM-4 MoE Lite's attention over a RowCache."""


_REROUTED: dict[type[nn.Module], type[nn.Module]] = {
    deepseek_v3.DeepseekV3Attention: DeepseekV3RowAttention,
    glm4_moe_lite.Glm4MoeLiteAttention: Glm4MoeLiteRowAttention,
}


def reroute_latent_attention(model: nn.Module) -> None:
    """Give the absorbed attention modules their rerouted call. Idempotent."""
    for module in model.modules():
        if (rerouted := _REROUTED.get(type(module))) is not None:
            module.__class__ = rerouted
