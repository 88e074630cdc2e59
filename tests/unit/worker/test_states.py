"""How a step's rows become padded sequences and back, which slots they use, and how vLLM's blocks become the pool's."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.paging import Paging, expand, paging_of
from pomarium.worker.kv_cache.placement import layout_of, state_layout_of
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import (
    CHEAP_ROWS,
    MAX_PADDING,
    StateCache,
    StateGroup,
    StateLayout,
    StatePool,
    bundle_lengths,
    plan_rows,
    plan_slots,
    sequence_slots,
    single_group_states,
)

CACHE = StateCache((3, 8), (2, 4, 4), mx.float32)
LENGTHS = st.lists(st.integers(1, 200), min_size=1, max_size=12)


def batch_of(lengths: list[int], starts: list[int], tables: list[tuple[int, ...]]) -> Batch:
    sequences = tuple(
        Sequence(str(number), start, length, (table,))
        for number, (length, start, table) in enumerate(zip(lengths, starts, tables, strict=True))
    )
    rows = np.arange(sum(lengths), dtype=np.int32)
    return Batch(sequences, rows, rows, rows[:0], rows[:0], (), {})


@given(LENGTHS)
def test_bundles_hold_each_sequence_once_within_the_bounds(lengths: list[int]) -> None:
    bundles = bundle_lengths(lengths)
    assert sorted(number for bundle in bundles for number in bundle) == list(range(len(lengths)))
    for bundle in bundles:
        rows = sum(lengths[number] for number in bundle)
        padded = len(bundle) * max(lengths[number] for number in bundle)
        assert padded <= MAX_PADDING * rows or padded - rows <= CHEAP_ROWS


def test_decode_rows_make_one_bundle_beside_a_prompt() -> None:
    assert bundle_lengths([1, 500, 1, 1]) == [[0, 2, 3], [1]]


@given(LENGTHS)
def test_rows_come_back_in_order(lengths: list[int]) -> None:
    """Each row stands at its place in its own sequence, padding aside, and the order undoes the regrouping."""
    plan = plan_rows(batch_of(lengths, [0] * len(lengths), [(1,)] * len(lengths)))
    first, outputs = np.cumsum([0, *lengths]), []
    for bundle in plan.bundles:
        rows = np.arange(sum(lengths)) if bundle.rows is None else np.array(bundle.rows)
        grouped = rows.reshape(len(bundle.sequences), bundle.length)
        for own, number in zip(grouped, bundle.sequences, strict=True):
            assert own[: lengths[number]].tolist() == list(range(first[number], first[number + 1]))
        own_lengths = [lengths[number] for number in bundle.sequences]
        got = [bundle.length] * len(own_lengths) if bundle.lengths is None else np.array(bundle.lengths).tolist()
        assert got == own_lengths
        outputs.append(rows)
    outputs_in_order = np.concatenate(outputs)
    if plan.order is not None:
        outputs_in_order = outputs_in_order[np.array(plan.order)]
    assert outputs_in_order.tolist() == list(range(sum(lengths)))


def test_sequences_at_position_0_are_fresh() -> None:
    plan = plan_rows(batch_of([1, 1], [0, 7], [(1,), (2,)]))
    (bundle,) = plan.bundles
    assert bundle.fresh is not None
    assert bundle.fresh.tolist() == [True, False]
    assert not bundle.all_fresh
    assert plan_rows(batch_of([2], [5], [(1,)])).bundles[0].fresh is None


def test_slots_follow_the_tokens() -> None:
    """The state after n tokens is in entry (n - 1) // block_size: kept in place, or left behind at a boundary."""
    batch = batch_of([1, 8, 3], [10, 8, 0], [(3, 5), (9, 7, 8), (4, 6)])
    assert sequence_slots(batch, StateGroup((0,), 8, 0)).tolist() == [[5, 5], [9, 7], [0, 4]]
    whole = sequence_slots(batch_of([1, 9], [10, 0], [(5,), (4,)]), StateGroup((0,), 256, 0))
    assert whole.tolist() == [[5, 5], [0, 4]]
    group = StateGroup((0,), 8, 0)
    rows = plan_rows(batch)
    for bundle, plan in zip(rows.bundles, plan_slots(batch, group, rows), strict=True):
        slots = sequence_slots(batch, group)[list(bundle.sequences)]
        assert [plan.read.tolist(), plan.write.tolist()] == slots.T.tolist()


def test_writes_reach_their_slots_only() -> None:
    pool = StatePool(single_group_states([CACHE, CACHE], 16, 6))
    conv, recurrent = mx.ones((2, *CACHE.conv)), mx.ones((2, *CACHE.recurrent))
    pool.write(1, mx.array([4, 2]), conv, recurrent)
    for layer, slot, value in ((1, 4, 1), (1, 2, 1), (1, 3, 0), (0, 4, 0)):
        for array in pool.read(layer, mx.array([slot])):
            assert (array == value).all()
    assert pool.nbytes == 2 * 6 * CACHE.nbytes


def test_layers_of_one_buffer_must_be_alike() -> None:
    other = StateCache((3, 16), (2, 4, 4), mx.float32)
    with pytest.raises(ValueError, match="differ"):
        StateLayout((CACHE, other), (StateGroup((0, 1), 8, 0),), (0, 0), 4)


@given(
    st.integers(1, 8),
    st.sampled_from([8, 64, 256]),
    st.sampled_from([8, 16, 32]),
    st.integers(1, 64),
    st.integers(0, 1 << 40),
)
def test_pages_hold_a_state_and_bytes_are_not_exceeded(
    heads: int, width: int, block: int, values: int, held: int
) -> None:
    state = StateCache((3, 4 * values), (values, 4, 4), mx.bfloat16)
    paging = paging_of([LayerCache(heads, width)], [state], 2, block)
    token = 2 * heads * width * 2
    assert paging.page == paging.tokens * token >= state.nbytes
    assert paging.page - block * token < state.nbytes
    assert paging.physical(paging.reported(held)) <= held


def test_models_without_states_keep_their_blocks() -> None:
    paging = paging_of([LayerCache(2, 64)], [], 2, 16)
    assert (paging.tokens, paging.physical(1000), paging.reported(1000)) == (16, 1000, 1000)
    assert paging == Paging(16)


def test_vllm_s_blocks_are_runs_of_the_pool_s() -> None:
    assert expand(((3, 0), (5,)), (4, 1)) == ((12, 13, 14, 15, 0, 1, 2, 3), (5,))


def config(**changes: object) -> SimpleNamespace:
    """vLLM's placement of two attention layers and four that keep states, in three groups of two buffers."""
    groups = [
        SimpleNamespace(layer_names=["layers.2", "layers.5"], kv_cache_spec=SimpleNamespace(block_size=96)),
        SimpleNamespace(layer_names=["layers.0", "layers.3"], kv_cache_spec=SimpleNamespace(block_size=256)),
        SimpleNamespace(layer_names=["layers.1", "layers.4"], kv_cache_spec=SimpleNamespace(block_size=256)),
    ]
    tensors = [SimpleNamespace(layers=group.layer_names, layer_stride=4096, offset=0) for group in groups]
    return SimpleNamespace(**{"num_blocks": 10, "kv_cache_tensors": tensors, "kv_cache_groups": groups, **changes})


def test_placement_of_a_hybrid_model() -> None:
    attention = layout_of(config(), [LayerCache(2, 8)] * 2, ["layers.2", "layers.5"], 6)
    assert (attention.num_blocks, attention.buffer_of_layer) == (60, (0, 1))
    assert [(group.layers, group.block_size, group.table) for group in attention.groups] == [((0, 1), 16, 0)]
    states = state_layout_of(config(), [CACHE] * 4, ["layers.0", "layers.1", "layers.3", "layers.4"])
    assert (states.num_slots, states.buffer_of_layer) == (10, (0, 0, 1, 1))
    assert [(group.layers, group.table) for group in states.groups] == [((0, 2), 1), ((1, 3), 2)]


def test_layers_of_two_shapes_at_one_address_get_a_buffer_each() -> None:
    """As Gemma 4's: vLLM gives the smaller heads more tokens per block, so that pages are of one size."""
    groups = [
        SimpleNamespace(layer_names=["layers.0", "layers.3"], kv_cache_spec=SimpleNamespace(block_size=32)),
        SimpleNamespace(layer_names=["layers.1", "layers.4"], kv_cache_spec=SimpleNamespace(block_size=32)),
        SimpleNamespace(layer_names=["layers.2", "layers.5"], kv_cache_spec=SimpleNamespace(block_size=16)),
    ]
    tensors = [SimpleNamespace(layers=group.layer_names, layer_stride=4096, offset=0) for group in groups]
    layers = [LayerCache(1, 8, 4), LayerCache(1, 8, 4), LayerCache(1, 16)] * 2
    layout = layout_of(
        config(kv_cache_groups=groups, kv_cache_tensors=tensors), layers, [f"layers.{index}" for index in range(6)], 1
    )
    assert layout.buffer_of_layer == (0, 0, 1, 2, 2, 3)
    assert [group.block_size for group in layout.groups] == [32, 32, 16]
    paging = paging_of(layers, [], 2, 16)
    counted = 10 * 2 * 16 * 2 * 16 * 2  # ten blocks at two addresses, of 16 tokens with K and V of 16 elements each
    assert paging.physical(counted) == PagedPool(layout, mx.bfloat16).nbytes
    assert paging.reported(2 * counted) == counted


def test_layers_of_one_window_never_share_an_address() -> None:
    assert paging_of([LayerCache(1, 8), LayerCache(2, 8)], [], 2, 16) == Paging(16)
