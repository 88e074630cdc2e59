"""Sample launches of the kernels that write the paged pool: for tests, and for a real GPU.

The pool starts out full of random numbers, so a write to a wrong place shows as much as one that is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import BlockShape, copy_blocks, reshape_and_cache, slot_indices, unset
from pomarium.kernels.cases.case import Case
from pomarium.kernels.cases.order import LAST_TOKEN, ordered
from pomarium.kernels.launch import Launcher


@dataclass(frozen=True)
class Writes:
    """What is written.

    Attributes:
        slots: where tokens go, negative ones nowhere. pairs: blocks to copy, source and destination.
    """

    shape: BlockShape
    slots: tuple[int, ...] = ()
    pairs: tuple[tuple[int, int], ...] = ()
    seed: int = 0


def _arrays(writes: Writes) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The buffers at first, (num_blocks, num_kv_heads, block_size, width), and what the tokens bring."""
    rng, shape = np.random.default_rng(writes.seed), writes.shape
    widths = [width for width in (shape.key_dim, shape.value_dim) if width]
    pool = [rng.integers(-99, 99, (shape.num_blocks, shape.num_kv_heads, shape.block_size, w)) for w in widths]
    brought = [rng.integers(-99, 99, (len(writes.slots), shape.num_kv_heads, w)) for w in widths]
    return pool, brought


def write(writes: Writes, launcher: Launcher) -> list[mx.array]:
    """The buffers and their token afterwards."""
    pool, brought = _arrays(writes)
    shape = writes.shape
    buffers = [mx.array(array.astype(np.float32)).astype(shape.dtype).reshape(-1, array.shape[-1]) for array in pool]
    mx.eval(buffers)
    owner = ordered(*buffers)
    if writes.slots:
        rows = [mx.array(array.astype(np.float32)).astype(shape.dtype) for array in brought]
        slots = slot_indices(np.array(writes.slots), shape.num_blocks * shape.block_size)
        reshape_and_cache(launcher, owner, shape, rows[0], rows[1] if len(rows) > 1 else None, slots)
    copy_blocks(launcher, owner, shape, writes.pairs)
    mx.eval(owner.arrays)
    return owner.arrays


def expected(writes: Writes) -> list[np.ndarray]:
    """The same by numpy. Integers, which every dtype holds."""
    pool, brought = _arrays(writes)
    for buffer, rows in zip(pool, brought, strict=True):
        for slot, row in zip(writes.slots, rows, strict=True):
            if slot >= 0:
                buffer[slot // writes.shape.block_size, :, slot % writes.shape.block_size] = row
        for source, destination in writes.pairs:
            buffer[destination] = buffer[source]
    return [*(buffer.reshape(-1, buffer.shape[-1]).astype(np.float64) for buffer in pool), np.array([LAST_TOKEN])]


WRITES: tuple[Writes, ...] = (
    Writes(BlockShape(7, 2, 16, 128, 128, mx.bfloat16), (5, 17, -1, 111, 0, 64, 63), ((1, 4), (6, 2))),
    Writes(BlockShape(5, 3, 8, 80, 64, mx.float16), (39, 8, 7, -1), ((0, 3),)),
    Writes(BlockShape(3, 1, 32, 576, 0, mx.float32), (95, 31, 32), ((2, 1),)),
    Writes(BlockShape(4, 5, 8, 512, 512, mx.float32), (1,)),
)
"""Equal and unequal widths, latents, one token, more and fewer chunks than threads."""


def _unset(launcher: Launcher) -> list[mx.array]:
    """Whether a buffer that was not written has its shape and dtype, and the token of the kernel that made it."""
    array, token = unset(launcher, (3, 1000), mx.bfloat16)
    mx.eval(array)
    return [token, mx.array([array.shape == (3, 1000) and array.dtype == mx.bfloat16])]


def cases(seed: int = 0) -> Iterator[Case]:
    """One case per sample, and one of a buffer that is not written; `seed` chooses the numbers."""
    yield Case("a buffer that is not written", _unset, lambda: [np.array([1.0]), np.array([1.0])], 0.0)
    for writes in WRITES:
        chosen = Writes(writes.shape, writes.slots, writes.pairs, seed)
        shape = chosen.shape
        kind = str(shape.dtype).removeprefix("mlx.core.")
        name = f"cache writes, {kind}, {shape.num_kv_heads} heads of {shape.key_dim} and {shape.value_dim}"
        yield Case(name, partial(write, chosen), partial(expected, chosen), 0.0)
