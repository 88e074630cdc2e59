"""Writes in place happen in order: one slot of the pool is written and read again and again, all in one evaluation.

Each write, by a kernel of its own or by attention that stores, brings another number, and each read attends to that
slot alone, so it returns what the slot holds. A read that overtakes the write before it, or a write that overtakes the
read before it, gives another number.
"""

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import BlockShape, reshape_and_cache, slot_indices
from pomarium.kernels.cases.case import Case
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered
from pomarium.kernels.paged_attention import AttentionShape, decode, plan_decode
from pomarium.kernels.paged_plan import Span
from pomarium.kernels.reference import Scoring

ROUNDS, DIM, BLOCK_SIZE = 40, 128, 16
DTYPE = mx.float32

FIRST_TOKEN, LAST_TOKEN = 6, 7
"""A kernel makes its token out of the one before, by setting the last bit."""


def ordered(*arrays: mx.array) -> Ordered:
    """An owner whose token is FIRST_TOKEN, and behind kernels that pass it on LAST_TOKEN."""
    pool = Ordered(*arrays)
    pool.access(lambda _, after: (None, after + FIRST_TOKEN))
    return pool


def _run(launcher: Launcher, stores: bool) -> list[mx.array]:
    """(ROUNDS, 1, DIM), what each read found. stores: attention writes."""
    pool = Ordered(*(mx.full((BLOCK_SIZE, DIM), float("nan"), DTYPE) for _ in range(2)))
    mx.eval(pool.arrays)
    shape = AttentionShape(1, 1, DIM, 1, BLOCK_SIZE, DTYPE)
    plan = plan_decode([Span(0, 1, 1)], [np.zeros(1, np.int32)], shape, None, Gpu(Family.CUDA, 1))
    blocks, slots = BlockShape(1, 1, BLOCK_SIZE, DIM, DIM, DTYPE), slot_indices(np.zeros(1, np.int64), BLOCK_SIZE)
    queries, scoring = mx.ones((1, 1, DIM), DTYPE), Scoring(1.0)
    found = []

    def attend(store: tuple[mx.array, mx.array] | None = None) -> mx.array:
        return pool.access(lambda arrays, after: decode(launcher, plan, queries, arrays, scoring, after, store))

    for number in range(ROUNDS):
        row = mx.full((1, 1, DIM), float(number), DTYPE)
        if stores:
            attend((row, row))
        else:
            reshape_and_cache(launcher, pool, blocks, row, row, slots)
        found.append(attend())
    return [mx.concatenate(found)]


def _expected() -> list[np.ndarray]:
    return [np.broadcast_to(np.arange(ROUNDS, dtype=np.float64)[:, None, None], (ROUNDS, 1, DIM))]


def cases() -> Iterator[Case]:
    """One for each writer. Attention to a single key gives its value exactly."""
    for stores, writer in ((False, "reshape_and_cache"), (True, "paged_attention_decode")):
        name = f"order of {ROUNDS} writes and reads of one slot, {writer}"
        yield Case(name, partial(_run, stores=stores), _expected, 0.0)
