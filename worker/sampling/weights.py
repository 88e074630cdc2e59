"""Unnormalised probabilities of whole rows, and how many rows to hold at once.

MLX on a CPU calls a scalar expf (about 20 ns an element, 35 ms for 32 x 49152), while its products and sums are
vectorised; on a GPU elementwise `exp` is free beside the memory traffic. Hence the polynomial on the CPU.
"""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx

_LOG2_E = 1 / math.log(2)
# 2**f = 1 + f * q(f) on [-0.5, 0.5], minimax, relative error 9e-8 in exact arithmetic. The leading 1 is exact on
# purpose: see `_exp_on_cpu`.
_EXP2 = (0.6931470036506653, 0.24022242426872253, 0.05550733581185341, 0.009671512991189957, 0.001326472731307149)
_ROUND = 1.5 * 2.0**23
_CPU_ELEMENTS = 1 << 18


def row_groups(indices: Sequence[int], vocab_size: int) -> Iterator[list[int]]:
    """Split row indices into groups to be computed together: all of them on a GPU, what fits a cache on a CPU.

    Intermediate arrays of several MiB cost more in page faults than in arithmetic.
    """
    size = len(indices) if _on_gpu() else max(1, _CPU_ELEMENTS // vocab_size)
    for start in range(0, len(indices), max(size, 1)):
        yield list(indices[start : start + size])


def exp_shifted(logits: mx.array) -> tuple[mx.array, mx.array]:
    """exp(logits - max) and max, float32 (G, V) and (G, 1), for float32 (G, V).

    -inf gives exactly 0. Values below 2**-127 of the maximum give 0. A row of -inf only gives NaN weights.
    """
    maximum = mx.max(logits, axis=-1, keepdims=True)
    shifted = logits - maximum
    return (mx.exp(shifted) if _on_gpu() else _exp_on_cpu(shifted)), maximum


def log_softmax(logits: mx.array) -> mx.array:
    """float32 (G, V). A row of -inf only stays -inf, where the formula would give NaN."""
    weights, maximum = exp_shifted(logits)
    normaliser = maximum + mx.log(mx.sum(weights, axis=-1, keepdims=True))
    return logits - mx.where(maximum == -mx.inf, 0.0, normaliser)


def _exp_on_cpu(x: mx.array) -> mx.array:
    """exp of non-positive float32, relative error about (3 + |x|) 1e-7, out of ops that MLX vectorises.

    x = (n + f) ln 2 with n an integer and |f| <= 1/2; 2**f is a polynomial, and n is added to its exponent bits. Adding
    1.5 * 2**23 rounds to n and leaves it in the low bits of the sum. At -127, where smaller values are clamped, f is 0,
    the polynomial is exactly 1.0 and its exponent becomes 0: the result is exactly +0.0.
    """
    scaled = mx.maximum(x * _LOG2_E, -127.0)
    rounded = scaled + _ROUND
    fraction = scaled - (rounded - _ROUND)
    power = fraction * _EXP2[4] + _EXP2[3]
    for coefficient in (_EXP2[2], _EXP2[1], _EXP2[0], 1.0):
        power = power * fraction + coefficient
    return (power.view(mx.int32) + mx.left_shift(rounded.view(mx.int32), 23)).view(mx.float32)


def _on_gpu() -> bool:
    return bool(mx.default_device().type == mx.DeviceType.gpu)
