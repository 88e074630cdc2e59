"""Writes into the paged pool, in place: the kernels' text on the emulator, their order, and what is refused."""

import re
from collections.abc import Callable
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from emulator.launcher import EmulatedLauncher
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.kernels.cache_writes import BlockShape, copy_blocks, reshape_and_cache, slot_indices
from pomarium.kernels.cases.cache_writes import WRITES, Writes, expected, write
from pomarium.kernels.launch import KernelSource, Launch
from pomarium.kernels.ordered import Ordered, indices_behind, token_behind

SHAPE = BlockShape(6, 2, 8, 64, 32, mx.float16)


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


def same(writes: Writes, launcher: EmulatedLauncher) -> bool:
    got = [np.array(array.astype(mx.float32)) for array in write(writes, launcher)]
    return all(np.array_equal(a, b) for a, b in zip(got, expected(writes), strict=True))


@pytest.mark.parametrize("writes", WRITES)
def test_samples_land_where_they_should_and_nowhere_else(writes: Writes, launcher: EmulatedLauncher) -> None:
    assert same(writes, launcher)


@settings(max_examples=20, deadline=None)
@given(
    slots=st.lists(st.integers(0, 47), min_size=1, max_size=30, unique=True),
    skipped=st.sets(st.integers(0, 29)),
    blocks=st.permutations(range(6)),
    copies=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_any_slots_and_copies(
    slots: list[int], skipped: set[int], blocks: list[int], copies: int, seed: int, launcher: EmulatedLauncher
) -> None:
    chosen = tuple(-1 if index in skipped else slot for index, slot in enumerate(slots))
    pairs = tuple((blocks[i], blocks[5 - i]) for i in range(copies))
    assert same(Writes(SHAPE, chosen, pairs, seed), launcher)


class Recorder:
    """A launcher that runs nothing and keeps what it was told."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        self.launches.append(launch)
        return [mx.full(shape, len(self.launches), dtype) for shape, dtype in launch.outputs]


def pool(dtype: mx.Dtype = mx.float16) -> Ordered:
    return Ordered(mx.zeros((96, 64), dtype), mx.zeros((96, 32), dtype))


def test_each_access_takes_the_token_of_the_one_before() -> None:
    recorder, ordered = Recorder(), pool()
    keys, values = mx.zeros((1, 2, 64), mx.float16), mx.zeros((1, 2, 32), mx.float16)
    reshape_and_cache(recorder, ordered, SHAPE, keys, values, slot_indices(np.array([3]), 48))
    copy_blocks(recorder, ordered, SHAPE, [(0, 1)])
    ordered.access(lambda arrays, after: (None, recorder.launch(KernelSource("x", (), ()), probe(after))[0]))
    copy_blocks(recorder, ordered, SHAPE, [(0, 1)])
    assert [int(launch.inputs[-1].item()) for launch in recorder.launches] == [0, 1, 2, 3]
    assert int(ordered.arrays[-1].item()) == 4


def probe(after: mx.array) -> Launch:
    return Launch((after,), (), (1, 1, 1), (1, 1, 1), (((1,), mx.int32),))


def test_operations_are_ordered_by_what_they_compute_with() -> None:
    """Indices depend on the token, and the token on what was gathered, NaN or not."""
    token = mx.array([7], mx.int32)
    assert indices_behind(mx.array([1, 2], mx.int32), token).tolist() == [1, 2]
    assert token_behind(token, mx.array([[1.0, 2.0]])).shape == (1,)
    assert token_behind(token, mx.array([float("nan")])).dtype == mx.int32


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: slot_indices(np.array([3, 48]), 48), r"slots \(2,\) name 48, outside a pool of 48 tokens"),
        (lambda r: copy_blocks(r, pool(), SHAPE, [(0, 6)]), "block 6 lies outside 6"),
        (lambda r: copy_blocks(r, pool(), SHAPE, [(-1, 2)]), "block -1 lies outside 6"),
        (lambda r: copy_blocks(r, pool(), SHAPE, [(0, 1), (1, 2)]), "overlap"),
        (lambda r: copy_blocks(r, pool(), SHAPE, [(0, 1), (2, 1)]), "overlap"),
        (lambda r: store(r, mx.zeros((1, 2, 32), mx.float16)), r"keys \(1, 2, 32\) .* \(1, 2, 64\)"),
        (lambda r: store(r, mx.zeros((1, 2, 64), mx.float32)), "keys .*float32 do not fit"),
        (lambda r: store(r, mx.zeros((1, 2, 64), mx.float16), False), "values missing for a pool of value width 32"),
        (lambda r: store(r, mx.zeros((9, 2, 64), mx.float16)), r"slots \(8,\) .* not one int32 per token \(9,\)"),
        (lambda r: store(r, KEYS, slots=mx.zeros((8,), mx.int64)), r"slots \(8,\) of mlx.core.int64"),
        (lambda r: store(r, KEYS, shape=replace(SHAPE, num_blocks=7)), r"pool of \(96, 64\) .* is not \[\(112, 64\)"),
        (lambda r: store(r, KEYS, shape=replace(SHAPE, block_size=4, num_blocks=5)), r"is not \[\(40, 64\)"),
        (lambda r: copy_blocks(r, pool(mx.float32), SHAPE, [(0, 1)]), "float32 is not .* of mlx.core.float16"),
        (lambda r: copy_blocks(r, pool(), replace(SHAPE, num_blocks=7), [(0, 6)]), r"is not \[\(112, 64\)"),
        (lambda r: copy_blocks(r, pool(), replace(SHAPE, key_dim=60), [(0, 1)]), "key width 60"),
        (lambda r: store(r, KEYS, shape=replace(SHAPE, value_dim=36)), "value width 36 of .* multiple of 16 bytes"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_launch(act: Callable[[Recorder], object], message: str) -> None:
    recorder = Recorder()
    with pytest.raises(ValueError, match=message):
        act(recorder)
    assert recorder.launches == []


KEYS = mx.zeros((1, 2, 64), mx.float16)


def store(
    recorder: Recorder,
    keys: mx.array,
    with_values: bool = True,
    slots: mx.array | None = None,
    shape: BlockShape = SHAPE,
) -> None:
    values = mx.zeros((keys.shape[0], 2, 32), mx.float16) if with_values else None
    chosen = slot_indices(np.array([0]), 48) if slots is None else slots
    reshape_and_cache(recorder, pool(), shape, keys, values, chosen)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (BlockShape(6, 2, 8, 60, 64, mx.float16), "key width 60 of .* is not a multiple of 16 bytes"),
        (BlockShape(6, 2, 8, 64, 4, mx.float16), "value width 4"),
        (BlockShape(6, 2, 8, 64, 64, mx.int8), "not one of float32"),
        (BlockShape(1 << 26, 4, 8, 64, 64, mx.float16), "over 2\\^31"),
    ],
)
def test_pools_that_the_kernels_cannot_write_say_why(shape: BlockShape, reason: str) -> None:
    assert shape.unsupported is not None
    assert re.search(reason, shape.unsupported)
    assert SHAPE.unsupported is None
