"""Writes into the paged pool: the K and V of a step's tokens, and copies of whole blocks.

    shape --unset--> a buffer that nothing was written to
    (tokens, heads, width) + slots --reshape_and_cache--> blocks, in place
    pairs of blocks --copy_blocks--> blocks, in place

A pool's buffer is (blocks, heads, block_size, width), row-major; K's and V's widths may differ, and V may be absent
(latents). Writes go through `Ordered`: whoever reads takes the token they leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels.launch import KernelSource, Launch, Launcher, Scalar
from pomarium.kernels.ordered import Ordered

RESHAPE_AND_CACHE = KernelSource(
    "reshape_and_cache", ("k", "v", "keys", "values", "slots", "after"), ("token",), ("keys", "values")
)
COPY_BLOCKS = KernelSource("copy_blocks", ("keys", "values", "pairs", "after"), ("token",), ("keys", "values"))
UNSET = KernelSource("unset", ("after",), ("out", "token"))
SOURCES: tuple[KernelSource, ...] = (RESHAPE_AND_CACHE, COPY_BLOCKS, UNSET)

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
"""Element types of a pool."""

LOAD_BYTES = 16
"""Bytes that a thread loads or stores at once: a token's part of a head is a multiple of it."""

_TOKEN = (((1,), mx.int32),)


@dataclass(frozen=True)
class BlockShape:
    """Of one pool.

    Attributes:
        num_blocks, num_kv_heads, block_size: of both buffers. key_dim, value_dim: widths; value_dim 0: no values.
    """

    num_blocks: int
    num_kv_heads: int
    block_size: int
    key_dim: int
    value_dim: int
    dtype: mx.Dtype

    @property
    def unsupported(self) -> str | None:
        """Why these kernels cannot write such a pool; None if they can."""
        if self.dtype not in DTYPES:
            return f"a pool of {self.dtype} is not one of float32, float16, bfloat16"
        for name, width in (("key", self.key_dim), ("value", self.value_dim)):
            if width * self.dtype.size % LOAD_BYTES:
                return f"{name} width {width} of {self.dtype} is not a multiple of {LOAD_BYTES} bytes"
        if self.num_blocks * self.num_kv_heads * self.block_size >= 1 << 31:
            return f"a pool of {self.num_blocks * self.num_kv_heads * self.block_size} rows is over 2^31"
        return None


def unset(launcher: Launcher, shape: tuple[int, ...], dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """An array of which no element was written, not-a-numbers included, and an int32 (1,) that is 1.

    For buffers of which only what was written is read: zeroing the pool of a large machine writes all of its memory.
    """
    launch = Launch((mx.zeros((8,), mx.int32),), (), (1, 1, 1), (1, 1, 1), ((shape, dtype), *_TOKEN))
    array, token = launcher.launch(UNSET, launch)
    return array, token


def slot_indices(slots: np.ndarray, pool_tokens: int) -> mx.array:
    """Where a step's tokens go, for `reshape_and_cache`; on the device.

    Args:
        slots: integers (tokens,), block x block_size + offset; negative: the token is not stored.
        pool_tokens: that the pool holds, num_blocks x block_size.

    Raises:
        ValueError: if a slot lies outside the pool.
    """
    if slots.size and int(slots.max()) >= pool_tokens:
        raise ValueError(f"slots {slots.shape} name {int(slots.max())}, outside a pool of {pool_tokens} tokens")
    return padded_ints(slots)


def padded_ints(values: np.ndarray) -> mx.array:
    """int32, row-major, flat, of at least 8 elements: MLX declares smaller inputs in another address space."""
    flat = np.ascontiguousarray(values, np.int32).reshape(-1)
    return mx.array(flat if flat.size >= 8 else np.concatenate([flat, np.zeros(8 - flat.size, np.int32)]))


def reshape_and_cache(
    launcher: Launcher, pool: Ordered, shape: BlockShape, keys: mx.array, values: mx.array | None, slots: mx.array
) -> None:
    """Store the K and V of T tokens.

    Args:
        pool: of the buffers of K and V, or of K alone (`shape.value_dim` 0, `values` None).
        keys: (T, num_kv_heads, key_dim). values: (T, num_kv_heads, value_dim). slots: of `slot_indices`.

    Raises:
        ValueError: if an array does not fit the pool, or the kernels do not take it.
    """
    _check_supported(shape)
    tokens = keys.shape[0]
    _check("keys", keys, (tokens, shape.num_kv_heads, shape.key_dim), shape.dtype)
    if values is not None:
        _check("values", values, (tokens, shape.num_kv_heads, shape.value_dim), shape.dtype)
    if (values is None) != (shape.value_dim == 0):
        raise ValueError(
            f"values {'missing' if values is None else 'given'} for a pool of value width {shape.value_dim}"
        )
    if slots.ndim != 1 or slots.dtype != mx.int32 or slots.size < tokens:
        raise ValueError(f"slots {slots.shape} of {slots.dtype} are not one int32 per token ({tokens},)")
    chunks = shape.num_kv_heads * max(shape.key_dim, shape.value_dim) * shape.dtype.size // LOAD_BYTES
    threads = _threads(chunks)
    template: tuple[tuple[str, Scalar], ...] = (
        ("T", shape.dtype),
        ("HK", shape.num_kv_heads),
        ("DK", shape.key_dim),
        ("DV", shape.value_dim),
        ("BS", shape.block_size),
    )

    def write(arrays: tuple[mx.array, ...], after: mx.array) -> tuple[None, mx.array]:
        _check_pool(arrays, shape)
        no_values = mx.zeros((8,), shape.dtype)
        inputs = (keys, no_values if values is None else values, *_both(arrays, no_values), slots, after)
        launch = Launch(inputs, template, (threads, tokens, 1), (threads, 1, 1), _TOKEN)
        return None, launcher.launch(RESHAPE_AND_CACHE, launch)[0]

    pool.access(write)


def copy_blocks(launcher: Launcher, pool: Ordered, shape: BlockShape, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks onto others.

    Args:
        pairs: (source, destination); no block may be both, nor twice a destination.

    Raises:
        ValueError: if it is, or lies outside the pool, or the kernels do not take the pool.
    """
    if not pairs:
        return
    _check_supported(shape)
    array = np.array(pairs, np.int64)
    if array.min() < 0 or array.max() >= shape.num_blocks:
        raise ValueError(f"block {array.max() if array.min() >= 0 else array.min()} lies outside {shape.num_blocks}")
    targets = set(array[:, 1].tolist())
    if len(targets) < len(pairs) or targets & set(array[:, 0].tolist()):
        raise ValueError(f"copies of blocks overlap: {list(pairs)}")
    elements = shape.num_kv_heads * shape.block_size
    template: tuple[tuple[str, Scalar], ...] = (
        ("T", shape.dtype),
        ("KN", elements * shape.key_dim),
        ("VN", elements * shape.value_dim),
    )
    threads = _threads(elements * shape.key_dim * shape.dtype.size // LOAD_BYTES)
    device_pairs = padded_ints(array)

    def write(arrays: tuple[mx.array, ...], after: mx.array) -> tuple[None, mx.array]:
        _check_pool(arrays, shape)
        inputs = (*_both(arrays, mx.zeros((8,), shape.dtype)), device_pairs, after)
        launch = Launch(inputs, template, (threads, len(pairs), 1), (threads, 1, 1), _TOKEN)
        return None, launcher.launch(COPY_BLOCKS, launch)[0]

    pool.access(write)


def _both(arrays: tuple[mx.array, ...], no_values: mx.array) -> tuple[mx.array, mx.array]:
    """The buffers of K and V; a pool of latents has no V, but the kernel's signature does."""
    return (arrays[0], arrays[1]) if len(arrays) == 2 else (arrays[0], no_values)


def _threads(chunks: int) -> int:
    """Threads of a threadgroup that copies so many chunks: whole simdgroups, at most 8."""
    return min(256, -(-chunks // 32) * 32)


def _check_supported(shape: BlockShape) -> None:
    if shape.unsupported is not None:
        raise ValueError(shape.unsupported)


def _check_pool(arrays: tuple[mx.array, ...], shape: BlockShape) -> None:
    rows = shape.num_blocks * shape.num_kv_heads * shape.block_size
    wanted = [(rows, width) for width in (shape.key_dim, shape.value_dim) if width]
    if [array.shape for array in arrays] != wanted or any(array.dtype != shape.dtype for array in arrays):
        found = ", ".join(f"{array.shape} of {array.dtype}" for array in arrays)
        raise ValueError(f"a pool of {found} is not {wanted} of {shape.dtype}")


def _check(name: str, array: mx.array, shape: tuple[int, ...], dtype: mx.Dtype) -> None:
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} {array.shape} of {array.dtype} do not fit a pool that takes {shape} of {dtype}")
