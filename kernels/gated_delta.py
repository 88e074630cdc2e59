"""Gated-delta layers (Qwen3-Next, Qwen3.5) over pools of states that are written in place: convolution and recurrence.

    slots of a step --plan, once per step and group--> GatedDeltaPlan
    projections --conv1d_silu, per layer--> q, k, v --recurrent--> outputs          the states in between, in place

A step in which every sequence has one token takes the decode kernels, any other one the prefill kernels, which take
sequences of one token, too. Nothing is padded, gathered or scattered. Sizes that the kernels take are in
`GatedDeltaShape.unsupported`. What is computed is mlx-lm's module between its projections and its norm
(mlx_lm/models/qwen3_next.py, Qwen3NextGatedDeltaNet; gated delta rule: arXiv 2412.06464).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import DTYPES, padded_ints
from pomarium.kernels.launch import KernelSource, Launch, Launcher, Scalar
from pomarium.kernels.ordered import Ordered

CONV_DECODE = KernelSource(
    "gdn_conv1d_silu_decode", ("x", "weight", "conv", "seqs", "after"), ("y", "token"), ("conv",)
)
CONV_PREFILL = KernelSource(
    "gdn_conv1d_silu_prefill", ("x", "weight", "conv", "seqs", "tiles", "after"), ("y", "token"), ("conv",)
)
_RECURRENT_INPUTS = ("qkv", "a", "b", "a_log", "dt_bias", "states", "seqs", "after")
RECURRENT_DECODE = KernelSource("gdn_recurrent_decode", _RECURRENT_INPUTS, ("y", "token"), ("states",))
RECURRENT_PREFILL = KernelSource("gdn_recurrent_prefill", _RECURRENT_INPUTS, ("y", "token"), ("states",))
SOURCES: tuple[KernelSource, ...] = (CONV_DECODE, CONV_PREFILL, RECURRENT_DECODE, RECURRENT_PREFILL)

CONV_TILE = 64
"""Tokens per thread of the convolution: enough that its first inputs, read once more, do not count."""
CONV_THREADS = 256
THREADGROUP_BYTES = 24 << 10
"""Threadgroup memory that the recurrence may take; Metal has 32 KiB."""
FRESH = -1
"""Slot to go on from that stands for zeros."""
NULL_SLOT = 0
"""vLLM's null block: several sequences may write it, if none goes on from it."""


@dataclass(frozen=True)
class GatedDeltaShape:
    """Of one model's layers and their pools.

    Attributes:
        key_heads, value_heads, key_dim, value_dim: of the recurrence; a key head serves several value heads.
        kernel_size: of the convolution. num_slots: of the pools. dtype: of activations and of convolution states.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    kernel_size: int
    num_slots: int
    dtype: mx.Dtype

    @property
    def channels(self) -> int:
        """Of the convolution: queries, keys and values, one after another."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim

    @property
    def unsupported(self) -> str | None:
        """Why the kernels do not take such layers; None if they do."""
        if self.dtype not in DTYPES:
            return f"dtype {self.dtype} (they take float32, float16 and bfloat16)"
        if self.value_heads % self.key_heads:
            return f"{self.value_heads} value heads over {self.key_heads} key heads"
        if self.key_dim % 16 or not 16 <= self.key_dim <= 256:
            return f"key heads of {self.key_dim} (they take multiples of 16 up to 256)"
        if self.value_dim % 8:
            return f"value heads of {self.value_dim} (they take multiples of 8)"
        if not 2 <= self.kernel_size <= 8:
            return f"a convolution over {self.kernel_size} tokens (they take 2 to 8)"
        return None


@dataclass(frozen=True)
class GatedDeltaPlan:
    """Index arrays of one step and one group of layers.

    Attributes:
        num_slots: of the pools. rows: T, of the step. count: S sequences.
        sequences: int32 (S x 4,) or longer: first row, tokens, slot to go on from or FRESH, slot to write.
        tiles: int32 (N x 2,) or longer: sequence, first token; of `num_tiles` tiles of the convolution. None: each
            sequence has one token, or none (see `plan_decode`).
    """

    num_slots: int
    rows: int
    count: int
    sequences: mx.array
    tiles: mx.array | None = None
    num_tiles: int = 0


def plan(lengths: np.ndarray, slots: np.ndarray, num_slots: int) -> GatedDeltaPlan:
    """Lay out a step of S sequences, whose rows stand one after another.

    Args:
        lengths: integers (S,), tokens of each sequence, at least 1.
        slots: integers (S, 2): to go on from, or FRESH; to write.

    Raises:
        ValueError: a sequence without tokens, a slot outside the pool, one that two sequences write, or one that a
            sequence writes and another one goes on from.
    """
    sequences = _sequences(lengths, slots, num_slots)
    rows, count = int(lengths.sum()), len(lengths)
    if rows == count:
        return GatedDeltaPlan(num_slots, rows, count, padded_ints(sequences))
    tiles = [(seq, start) for seq, length in enumerate(lengths.tolist()) for start in range(0, length, CONV_TILE)]
    return GatedDeltaPlan(num_slots, rows, count, padded_ints(sequences), padded_ints(np.array(tiles)), len(tiles))


def plan_decode(slots: np.ndarray, num_slots: int, rows: int) -> GatedDeltaPlan:
    """Lay out a step of S sequences of one token each, padded to `rows`: what is too much stores nothing.

    Args:
        slots: as `plan`.

    Raises:
        ValueError: as `plan`, or there are more than `rows`.
    """
    count = len(slots)
    if count > rows:
        raise ValueError(f"{count} sequences do not fit {rows} rows")
    padding = np.array([[row, 0, FRESH, NULL_SLOT] for row in range(count, rows)], np.int64).reshape(-1, 4)
    sequences = np.concatenate([_sequences(np.ones(count, np.int64), slots, num_slots), padding])
    return GatedDeltaPlan(num_slots, rows, rows, padded_ints(sequences))


def _sequences(lengths: np.ndarray, slots: np.ndarray, num_slots: int) -> np.ndarray:
    """GatedDeltaPlan.sequences on the host, (S, 4). Arguments and errors as `plan`."""
    if lengths.ndim != 1 or not lengths.size or slots.shape != (len(lengths), 2):
        raise ValueError(f"slots {slots.shape} do not fit lengths {lengths.shape}")
    if lengths.min() < 1:
        raise ValueError(f"sequence {int(lengths.argmin())} has no tokens")
    read, written = slots[:, 0], slots[:, 1]
    if read.min() < FRESH or written.min() < 0 or slots.max() >= num_slots:
        raise ValueError(f"slots {int(slots.min())} to {int(slots.max())} lie outside a pool of {num_slots}")
    kept = written[written != NULL_SLOT]
    if len(set(kept.tolist())) < len(kept):
        raise ValueError(f"two sequences write one of the slots {written.tolist()}")
    if any(slot in set(written[read != slot].tolist()) for slot in read[read != FRESH].tolist()):
        raise ValueError(f"a sequence goes on from a slot that another one writes: {slots.tolist()}")
    first = np.cumsum(lengths) - lengths
    laid: np.ndarray = np.concatenate([first[:, None], lengths[:, None], slots], axis=1)
    return laid


def conv1d_silu(
    launcher: Launcher, pool: Ordered, shape: GatedDeltaShape, plan: GatedDeltaPlan, x: mx.array, weight: mx.array
) -> mx.array:
    """silu of the causal depthwise convolution of each sequence behind its state; stores the new states.

    Args:
        pool: of (num_slots, kernel_size - 1, channels), the last inputs, of shape.dtype.
        x: (T, channels). weight: (channels, kernel_size).

    Returns:
        (T, channels).

    Raises:
        ValueError: an array or the plan does not fit, or the kernels do not take the shape.
    """
    _check_shape(shape, plan)
    _check("x", x, (plan.rows, shape.channels), shape.dtype)
    _check("weight", weight, (shape.channels, shape.kernel_size), shape.dtype)
    template: tuple[tuple[str, Scalar], ...] = (("T", shape.dtype), ("C", shape.channels), ("K", shape.kernel_size))
    columns = -(-shape.channels // CONV_THREADS) * CONV_THREADS

    def run(arrays: tuple[mx.array, ...], after: mx.array) -> tuple[mx.array, mx.array]:
        (conv,) = arrays
        _check("conv", conv, (shape.num_slots, shape.kernel_size - 1, shape.channels), shape.dtype)
        outputs = ((x.shape, x.dtype), ((1,), mx.int32))
        group = (CONV_THREADS, 1, 1)
        if plan.tiles is None:
            launch = Launch(
                (x, weight, conv, plan.sequences, after), template, (columns, plan.count, 1), group, outputs
            )
            y, token = launcher.launch(CONV_DECODE, launch)
        else:
            inputs = (x, weight, conv, plan.sequences, plan.tiles, after)
            tiled = (*template, ("TT", CONV_TILE))
            launch = Launch(inputs, tiled, (columns, plan.num_tiles, 1), group, outputs)
            y, token = launcher.launch(CONV_PREFILL, launch)
        return y, token

    return pool.access(run)


def recurrent(
    launcher: Launcher,
    pool: Ordered,
    shape: GatedDeltaShape,
    plan: GatedDeltaPlan,
    qkv: mx.array,
    a: mx.array,
    b: mx.array,
    a_log: mx.array,
    dt_bias: mx.array,
) -> mx.array:
    """The gated delta rule over each sequence, from its state; stores the new states.

    Args:
        pool: of (num_slots, value_heads, value_dim, key_dim) float32.
        qkv: (T, channels), outputs of `conv1d_silu`. a, b: (T, value_heads), inputs of the gates.
        a_log, dt_bias: (value_heads,), of any float dtype.

    Returns:
        (T, value_heads, value_dim) of qkv's dtype.

    Raises:
        ValueError: an array or the plan does not fit, or the kernels do not take the shape.
    """
    heads = shape.value_heads
    _check_shape(shape, plan)
    _check("qkv", qkv, (plan.rows, shape.channels), shape.dtype)
    _check("a", a, (plan.rows, heads), shape.dtype)
    _check("b", b, (plan.rows, heads), shape.dtype)
    for name, array in (("a_log", a_log), ("dt_bias", dt_bias)):
        if array.shape != (heads,) or array.dtype not in DTYPES:
            raise ValueError(f"{name} {array.shape} of {array.dtype} does not fit {heads} value heads")
    simdgroups = next(count for count in (4, 2, 1) if shape.value_dim % (8 * count) == 0)
    template: tuple[tuple[str, Scalar], ...] = (
        ("T", shape.dtype),
        ("HK", shape.key_heads),
        ("HV", heads),
        ("DK", shape.key_dim),
        ("DV", shape.value_dim),
        ("NSG", simdgroups),
    )
    source = RECURRENT_DECODE if plan.tiles is None else RECURRENT_PREFILL
    if plan.tiles is not None:
        template = (*template, ("TT", tile_tokens(shape.key_dim, 8 * simdgroups)))

    def run(arrays: tuple[mx.array, ...], after: mx.array) -> tuple[mx.array, mx.array]:
        (states,) = arrays
        _check("states", states, (shape.num_slots, heads, shape.value_dim, shape.key_dim), mx.float32)
        launch = Launch(
            (qkv, a, b, a_log, dt_bias, states, plan.sequences, after),
            template,
            (4 * shape.value_dim, heads, plan.count),
            (32 * simdgroups, 1, 1),
            (((plan.rows, heads, shape.value_dim), shape.dtype), ((1,), mx.int32)),
        )
        y, token = launcher.launch(source, launch)
        return y, token

    return pool.access(run)


def tile_tokens(key_dim: int, rows: int) -> int:
    """Tokens that the prefill recurrence brings into threadgroup memory at once: 4, 8 or 16."""
    per_token = 4 * (2 * key_dim + rows + 2)
    return next(tokens for tokens in (16, 8, 4) if tokens * per_token <= THREADGROUP_BYTES)


def _check_shape(shape: GatedDeltaShape, plan: GatedDeltaPlan) -> None:
    if shape.unsupported is not None:
        raise ValueError(f"the gated-delta kernels do not take {shape.unsupported}")
    if plan.num_slots != shape.num_slots:
        raise ValueError(f"a plan over {plan.num_slots} slots does not fit pools of {shape.num_slots}")


def _check(name: str, array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} {array.shape} of {array.dtype} is not {shape} of {dtype}")
