"""What mla_decode and mla_reduce compute, as MLX operations."""

import mlx.core as mx

from pomarium.kernels.reference import MASKED, Scoring, grouped_attention


def latent_attention(
    queries: mx.array,
    latents: mx.array,
    block_tables: mx.array,
    lengths: mx.array,
    *,
    rank: int,
    block_size: int,
    scale: float,
) -> mx.array:
    """Absorbed attention of one query per sequence over paged latents (DeepSeek-V2, arXiv 2405.04434, appendix C).

    Args:
        queries: (S, H, rank + rope_dim). latents: (blocks x block_size, rank + rope_dim), whose first `rank` elements
            are the values. block_tables: int32 (S, B), all entries within the pool. lengths: int32 (S,), tokens seen.

    Returns:
        (S, H, rank) of the queries' dtype; softmax in float32.
    """
    sequences, blocks = block_tables.shape
    width = latents.shape[-1]
    gathered = mx.take(latents.reshape(-1, block_size * width), block_tables, axis=0)
    keys = gathered.reshape(sequences, 1, blocks * block_size, width)
    seen = mx.arange(blocks * block_size) < lengths[:, None]
    bias = mx.where(seen, 0.0, MASKED)[:, None, None, None]
    return grouped_attention(queries, keys, keys[..., :rank], bias, Scoring(scale))
