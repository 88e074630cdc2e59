"""Who computes what in the paged attention kernels: decisions on the host, and variants that fit the hardware."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.kernels.gpu_family import H100, Family, Gpu
from pomarium.kernels.paged_attention import BLOCK_SIZES, HEAD_DIMS
from pomarium.kernels.paged_plan import (
    MOST_ITEMS,
    Span,
    checked_tables,
    decode_work,
    partition,
    prefill_work,
    reduce_work,
)
from pomarium.kernels.paged_tuning import (
    DECODE,
    THREADGROUP_BYTES,
    DecodeVariant,
    decode_variant,
    prefill_variant,
)

GPUS = [H100, Gpu(Family.APPLE, 10)]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@st.composite
def span_lists(draw: st.DrawFn) -> list[Span]:
    spans, row = [], 0
    for _ in range(draw(st.integers(1, 8))):
        tokens = draw(st.integers(1, 4))
        spans.append(Span(row, tokens, tokens + draw(st.integers(0, 9000))))
        row += tokens
    return spans


@given(
    spans=span_lists(),
    window=st.none() | st.integers(1, 5000),
    wanted=st.integers(0, 600),
    quantum=st.sampled_from([8, 32, 64]),
)
def test_partitions_hold_each_key_that_is_seen_once(
    spans: list[Span], window: int | None, wanted: int, quantum: int
) -> None:
    items = partition(spans, window, wanted, quantum, (64, 512))
    assert len(items) <= MOST_ITEMS
    for index, span in enumerate(spans):
        own = items[items[:, 0] == index]
        assert own[0, 1] == span.first_key(window)
        assert own[-1, 2] == span.context
        assert (own[1:, 1] == own[:-1, 2]).all()
        assert (own[:, 2] > own[:, 1]).all()
        assert ((own[:-1, 2] - own[:-1, 1]) % quantum == 0).all()
    work, reduce = decode_work(spans, items), reduce_work(spans, items)
    row = 0
    for index, span in enumerate(spans):
        for token in range(span.tokens):
            first, count, within, _ = reduce[row]
            assert within == token
            assert (work[first : first + count, :4] == [index, span.first_token, span.tokens, span.context]).all()
            assert count == (items[:, 0] == index).sum()
            row += 1
    assert row == len(reduce)


def test_many_long_sequences_stay_within_a_grid() -> None:
    spans = [Span(i, 1, 40_000) for i in range(1000)]
    assert len(partition(spans, None, 1 << 20, 8, (8, 64))) <= MOST_ITEMS


def test_a_single_long_sequence_fills_the_gpu_and_a_ragged_batch_is_even() -> None:
    wanted = 50
    assert len(partition([Span(0, 1, 8192)], None, wanted, 32, (64, 512))) in range(wanted - 8, wanted + 1)
    spans = [Span(i, 1, length) for i, length in enumerate([1, 100, 4000, 8192, 30, 700])]
    items = partition(spans, None, wanted, 32, (64, 512))
    lengths = items[:, 2] - items[:, 1]
    assert lengths.max() <= 512
    assert len(items) <= wanted + len(spans)


@given(
    spans=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 300)), min_size=1, max_size=5),
    group=st.integers(1, 16),
    rows=st.sampled_from([32, 64]),
)
def test_tiles_hold_each_row_once_and_the_longest_come_first(
    spans: list[tuple[int, int]], group: int, rows: int
) -> None:
    first = np.cumsum([0, *(tokens for tokens, _ in spans)])
    chosen = [Span(int(row) + 5, n, n + before) for row, (n, before) in zip(first[:-1], spans, strict=True)]
    work = prefill_work(chosen, group, rows)
    for index, span in enumerate(chosen):
        own = work[work[:, 0] == index]
        assert sorted(own[:, 4].tolist()) == list(range(0, span.tokens * group, rows))
        assert (own[:, 1:4] == [span.first_token, span.tokens, span.context]).all()
        assert (own[:, 5] == first[index]).all()
    keys = work[:, 3] - work[:, 2] + np.minimum((work[:, 4] + rows - 1) // group, work[:, 2] - 1)
    assert (np.diff(keys) <= 0).all()


def test_tables_of_different_length_are_padded_with_a_block_that_exists() -> None:
    spans = [Span(0, 1, 8), Span(1, 2, 17)]
    tables = [np.array([3]), np.array([1, 2, 5])]
    assert checked_tables(spans, tables, 6, 8, None).tolist() == [[3, 0, 0], [1, 2, 5]]


def test_a_table_is_held_against_its_own_sequence() -> None:
    """A longer table beside it changes nothing."""
    tables = [np.array([3]), np.array([1, 2, 5])]
    with pytest.raises(ValueError, match="context of 9 tokens is longer than its block table: 1 blocks of 8"):
        checked_tables([Span(0, 1, 9), Span(1, 2, 17)], tables, 6, 8, None)
    with pytest.raises(ValueError, match="1 block tables do not fit 2 sequences"):
        checked_tables([Span(0, 1, 8), Span(1, 2, 17)], tables[:1], 6, 8, None)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.family)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_variants_fit_the_hardware(gpu: Gpu, dtype: mx.Dtype, head_dim: int) -> None:
    for rows in range(1, 65):
        variant = decode_variant(gpu, dtype, head_dim, rows)
        check_decode(variant, gpu, dtype, head_dim)
    chunk = prefill_variant(gpu, dtype, head_dim)
    assert 2 * chunk.keys * (head_dim + chunk.padding) * dtype.size <= THREADGROUP_BYTES
    assert chunk.keys % 8 == 0
    assert chunk.padding * dtype.size % 16 == 0


def check_decode(variant: DecodeVariant, gpu: Gpu, dtype: mx.Dtype, head_dim: int) -> None:
    for number in (variant.rows, variant.lanes, variant.unroll):
        assert number & (number - 1) == 0
    assert 4 <= variant.lanes <= 32
    loads = head_dim * dtype.size // 16
    per_lane = -(-loads // variant.lanes) * 16 // dtype.size
    assert variant.rows * per_lane <= max(per_lane, DECODE[gpu.family].elements)
    together = next(rows for rows in (16, 8, 4, 2, 1) if variant.simdgroups * rows * head_dim <= 4096)
    stored = 4 * variant.simdgroups * (min(together, variant.rows) * head_dim + 2 * variant.rows)
    assert stored <= THREADGROUP_BYTES
    assert min(together, variant.rows) * 4 >= variant.rows


def test_block_sizes_are_the_worker_s() -> None:
    assert BLOCK_SIZES == (8, 16, 32)
