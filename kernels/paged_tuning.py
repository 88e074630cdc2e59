"""Choices of the paged attention kernels by GPU family and shape: speed, never results.

    (Gpu, dtype, head size, rows that share a load) --decode_variant, prefill_variant--> template parameters

A row is a query token and one head of the group that shares a KV head. What bounds the choice is registers: a lane
holds `rows` times its share of the head for the queries and as much again for the results.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx

from pomarium.kernels.gpu_family import Family, Gpu

LOAD_BYTES = 16


@dataclass(frozen=True)
class DecodeTuning:
    """Of one family.

    Attributes:
        elements: float32 results that a lane may hold, queries not counted. loads: 16-byte loads of K in flight per
            lane, and as many of V. simdgroups: per threadgroup. threadgroups: that a core holds at once.
        keys: least and most per partition: a partial result is to cost little beside its keys, and the last
            threadgroups to end not long after the others.
    """

    elements: int
    loads: int
    simdgroups: int
    threadgroups: int
    keys: tuple[int, int]


@dataclass(frozen=True)
class DecodeVariant:
    """Template parameters of paged_attention_decode."""

    rows: int
    lanes: int
    unroll: int
    simdgroups: int

    @property
    def keys(self) -> int:
        """Keys that a threadgroup takes at once."""
        return 32 // self.lanes * self.unroll * self.simdgroups


@dataclass(frozen=True)
class PrefillTuning:
    """Of one family.

    Attributes:
        simdgroups: per threadgroup. row_blocks: of 8 rows per simdgroup, while the head size allows. keys: per tile.
        contiguous: whether MLX's own attention over contiguous K and V is faster where it fits (contiguous_prefill).
    """

    simdgroups: int
    row_blocks: int
    keys: int
    contiguous: bool


@dataclass(frozen=True)
class PrefillVariant:
    """Template parameters of paged_attention_prefill."""

    simdgroups: int
    row_blocks: int
    keys: int
    padding: int

    @property
    def rows(self) -> int:
        """Rows of a threadgroup."""
        return 8 * self.simdgroups * self.row_blocks


DECODE: Mapping[Family, DecodeTuning] = {
    # Expected, not measured: about 100 registers per thread, so that 16 or more simdgroups share a core.
    Family.APPLE: DecodeTuning(elements=32, loads=2, simdgroups=4, threadgroups=4, keys=(64, 1024)),
    # H100: of some 40 choices none was more than 5% faster at 32 x 4096 (benchmarks/paged_kernels.py --sweep).
    Family.CUDA: DecodeTuning(elements=64, loads=2, simdgroups=8, threadgroups=2, keys=(64, 512)),
}

PREFILL: Mapping[Family, PrefillTuning] = {
    Family.APPLE: PrefillTuning(simdgroups=4, row_blocks=1, keys=16, contiguous=False),
    Family.CUDA: PrefillTuning(simdgroups=4, row_blocks=2, keys=16, contiguous=True),
}

THREADGROUP_BYTES = 32768
"""Of threadgroup memory, Apple's limit."""


def decode_variant(gpu: Gpu, dtype: mx.Dtype, head_dim: int, rows: int) -> DecodeVariant:
    """For sequences of up to `rows` rows per KV head."""
    tuning = DECODE[gpu.family]
    loads = head_dim * dtype.size // LOAD_BYTES
    lanes = min(32, max(4, _power_above(loads)))
    per_lane = -(-loads // lanes)
    most = min(16, max(1, _power_below(tuning.elements * dtype.size // (per_lane * LOAD_BYTES))))
    chunks = -(-rows // most)
    kept = min(most, _power_above(-(-rows // chunks)))
    unroll = max(1, min(_power_below(max(1, tuning.loads // per_lane)), 16 // kept))
    return DecodeVariant(kept, lanes, unroll, tuning.simdgroups)


def prefill_variant(gpu: Gpu, dtype: mx.Dtype, head_dim: int) -> PrefillVariant:
    """For prompt chunks."""
    tuning = PREFILL[gpu.family]
    row_blocks = tuning.row_blocks if head_dim <= 128 else 1
    padding, keys = LOAD_BYTES // dtype.size, tuning.keys
    while keys > 8 and 2 * keys * (head_dim + padding) * dtype.size > THREADGROUP_BYTES:
        keys //= 2
    if 2 * keys * (head_dim + padding) * dtype.size > THREADGROUP_BYTES:
        padding = 0
    return PrefillVariant(tuning.simdgroups, row_blocks, keys, padding)


def _power_above(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
