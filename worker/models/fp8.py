"""FP8 weights with a scale per block, made dense before mlx-lm's definition sees them.

    X (E4M3 bytes, lazy), X_scale_inv (lazy) --dequantised--> X, lazy, in the model's dtype: names of a dense checkpoint

Some of mlx-lm's definitions do this in their `sanitize` (quantisation.py lists them); for all others it is done here,
by names alone, so that it serves every family whose dense checkpoints mlx-lm loads. Everything stays lazy: shapes and
dtypes are checked here, values when a layer is evaluated (load.py), and of another stage's layers nothing is read.

Format: DeepSeek-V3's, which Qwen's FP8 releases and transformers' FineGrainedFP8 share. A weight (..., m, n) of
float8_e4m3fn has scales (..., ceil(m / rows), ceil(n / columns)); element = weight x scale of its block. MLX loads the
bytes as uint8.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from pomarium.worker.errors import CheckpointError

SUFFIX = "_scale_inv"


@dataclass(frozen=True)
class Blocks:
    """Elements of a weight that share a scale."""

    rows: int
    columns: int


def dequantised(weights: Mapping[str, mx.array], blocks: Blocks, dtype: mx.Dtype, where: str) -> dict[str, mx.array]:
    """`weights` without scales, the FP8 ones in `dtype`; lazy.

    Args:
        where: the checkpoint, for messages.

    Raises:
        CheckpointError: a scale without its weight or of another shape, or a weight without its scale.
    """
    dense = {name: array for name, array in weights.items() if not name.endswith(SUFFIX)}
    for name, scales in weights.items():
        if name.endswith(SUFFIX):
            base = name.removesuffix(SUFFIX)
            if problem := _problem(dense.get(base), scales, blocks):
                raise CheckpointError(f"{where}: the FP8 scales {name!r} {problem}; use the complete checkpoint.")
            dense[base] = _dequantised(dense[base], scales, blocks, dtype)
    if bare := [name for name, array in dense.items() if array.dtype == mx.uint8]:
        raise CheckpointError(
            f"{where}: the FP8 weight {bare[0]!r} has no scales ({bare[0]}{SUFFIX}); use the complete checkpoint."
        )
    return dense


def _problem(weight: mx.array | None, scales: mx.array, blocks: Blocks) -> str | None:
    if weight is None:
        return "have no weight"
    if weight.dtype != mx.uint8 or weight.ndim < 2:
        return f"belong to a weight of {weight.ndim} dimensions in {weight.dtype}, which is not FP8"
    if not mx.issubdtype(scales.dtype, mx.floating):
        return f"are of {scales.dtype} and not floating point"
    *stacked, rows, columns = weight.shape
    wanted = (*stacked, -(-rows // blocks.rows), -(-columns // blocks.columns))
    if scales.shape != wanted:
        return (
            f"have shape {scales.shape}, and a weight {weight.shape} in blocks of {blocks.rows} x {blocks.columns} "
            f"takes {wanted}"
        )
    return None


def _dequantised(weight: mx.array, scales: mx.array, blocks: Blocks, dtype: mx.Dtype) -> mx.array:
    """Computed in float32; blocks at the edges may be smaller, and are padded for the product."""
    *stacked, rows, columns = weight.shape
    tall, wide = scales.shape[-2:]
    values = mx.from_fp8(weight, dtype=mx.float32)
    if (tall * blocks.rows, wide * blocks.columns) != (rows, columns):
        edges = [(0, 0)] * len(stacked) + [(0, tall * blocks.rows - rows), (0, wide * blocks.columns - columns)]
        values = mx.pad(values, edges)
    values = values.reshape(*stacked, tall, blocks.rows, wide, blocks.columns)
    values = values * scales.astype(mx.float32)[..., :, None, :, None]
    values = values.reshape(*stacked, tall * blocks.rows, wide * blocks.columns)
    return values[..., :rows, :columns].astype(dtype)
