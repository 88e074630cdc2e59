"""GGML tensor bytes -> MLX arrays: Q4_0, Q4_1 and Q8_0 stay quantised, everything else becomes dense.

    uint8 (rows, bytes per row) --to_affine--> Affine(weight, scales, biases), group size 32
                                --to_dense--> float array (rows, columns)

MLX's affine form is w = scale * q + bias with unsigned q; in a packed uint32 the first element has the lowest bits
(mlx.core.dequantize). GGML's blocks hold 32 elements with fp16 d (and m): Q4_0 w = d(q - 8), Q4_1 w = dq + m, both
with element i in the low and i + 16 in the high nibble of byte i; Q8_0 w = dq with signed q (ggml-common.h). The
affine biases -8d and -128d are exact in fp16 as long as they do not overflow, which is checked.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from pomarium.worker.errors import CheckpointError, UnsupportedError

GROUP_SIZE = 32
AFFINE_BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}


@dataclass(frozen=True)
class Affine:
    """weight: uint32 (rows, columns * bits / 32). scales, biases: float16 (rows, columns / 32)."""

    weight: mx.array
    scales: mx.array
    biases: mx.array
    bits: int


def to_affine(raw: np.ndarray, kind: GGMLQuantizationType) -> Affine:
    """Repack whole blocks of a type in AFFINE_BITS; `raw` is uint8 (rows, bytes per row), values unchanged to the bit.

    Raises:
        CheckpointError: a scale is so large that the bias overflows float16 (no sane weights do).
    """
    rows = raw.shape[0]
    if kind is GGMLQuantizationType.Q8_0:
        blocks = raw.reshape(rows, -1, 34)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0]
        biases = scales * np.float16(-128)
        weight = (blocks[..., 2:] ^ np.uint8(0x80)).reshape(rows, -1).view(np.uint32)
    else:
        head = 2 if kind is GGMLQuantizationType.Q4_0 else 4
        blocks = raw.reshape(rows, -1, head + 16)
        scales = blocks[..., :2].copy().view(np.float16)[..., 0]
        biases = scales * np.float16(-8) if head == 2 else blocks[..., 2:4].copy().view(np.float16)[..., 0]
        nibbles = np.concatenate([blocks[..., head:] & 0xF, blocks[..., head:] >> 4], axis=-1)
        weight = (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).reshape(rows, -1).view(np.uint32)
    if not (np.isfinite(scales).all() and np.isfinite(biases).all()):
        raise CheckpointError(f"the file is damaged: a {kind.name} tensor holds a scale that is not a usable number.")
    return Affine(mx.array(weight), mx.array(scales), mx.array(biases), AFFINE_BITS[kind])


def to_dense(raw: np.ndarray, kind: GGMLQuantizationType) -> mx.array:
    """F32, F16 and BF16 as they are; quantised types dequantised by the gguf package and rounded to float16.

    Raises:
        UnsupportedError: a type that the gguf package does not dequantise.
    """
    if kind is GGMLQuantizationType.F32:
        return mx.array(raw.view(np.float32))
    if kind is GGMLQuantizationType.F16:
        return mx.array(raw.view(np.float16))
    if kind is GGMLQuantizationType.BF16:
        return mx.array(raw.view(np.uint16)).view(mx.bfloat16)
    try:
        return mx.array(dequantize(raw, kind).astype(np.float16))
    except NotImplementedError:
        raise UnsupportedError(f"tensors of type {kind.name} are not supported; use a Q4_0 or Q8_0 file.") from None
