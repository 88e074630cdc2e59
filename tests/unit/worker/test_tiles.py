"""Cutting and bundling: each row once, every key it sees, bounded padding."""

from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.attention.tiles import CHEAP_AREA, MAX_KEYS, MAX_PADDING, MAX_QUERIES, Rows, bundle, cut

BATCHES = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 900)), min_size=1, max_size=12)
BLOCKS = st.sampled_from([8, 16, 32])
WINDOWS = st.none() | st.integers(1, 600)


def rows_of(batch: list[tuple[int, int]]) -> list[Rows]:
    rows, first = [], 0
    for start, length in batch:
        rows.append(Rows(first, start, length))
        first += length
    return rows


@given(BATCHES, BLOCKS, WINDOWS)
def test_tiles_cover_each_row_once_with_every_key_it_sees(
    batch: list[tuple[int, int]], block: int, window: int | None
) -> None:
    rows = rows_of(batch)
    covered = []
    for tile in cut(rows, block, window):
        assert 1 <= tile.length <= MAX_QUERIES
        own = rows[tile.sequence]
        assert tile.position - own.start == tile.first_row - own.first_row
        covered += range(tile.first_row, tile.first_row + tile.length)
        for position in (tile.position, tile.position + tile.length - 1):
            first_key = 0 if window is None else max(0, position - window + 1)
            assert tile.first_block * block <= first_key
            assert position < tile.end_block * block
    assert covered == list(range(sum(length for _, length in batch)))


@given(BATCHES, BLOCKS, WINDOWS)
def test_a_window_reads_no_block_before_its_first_key(
    batch: list[tuple[int, int]], block: int, window: int | None
) -> None:
    for tile in cut(rows_of(batch), block, window):
        first_key = 0 if window is None else max(0, tile.position - window + 1)
        assert tile.first_block == first_key // block
        assert (tile.end_block - 1) * block < tile.position + tile.length


@given(BATCHES, BLOCKS, WINDOWS)
def test_bundles_partition_the_tiles_and_bound_the_padding(
    batch: list[tuple[int, int]], block: int, window: int | None
) -> None:
    tiles = cut(rows_of(batch), block, window)
    bundles = bundle(tiles, block)
    assert sorted((t for group in bundles for t in group), key=lambda t: t.first_row) == tiles
    for group in bundles:
        longest, widest = max(t.length for t in group), max(t.blocks for t in group) * block
        area = sum(t.length * t.blocks * block for t in group)
        padded = len(group) * longest * widest
        assert len(group) == 1 or len(group) * widest <= MAX_KEYS
        # A cheap join may be followed by joins that are within the factor, so the two allowances add.
        assert len(group) == 1 or padded <= MAX_PADDING * area + CHEAP_AREA


def test_decode_rows_of_like_length_are_one_bundle() -> None:
    rows = [Rows(index, 190 + index % 7, 1) for index in range(32)]
    assert len(bundle(cut(rows, 16, None), 16)) == 1


def test_a_long_chunk_skips_keys_that_only_later_rows_see() -> None:
    tiles = cut([Rows(0, 0, 2048)], 16, None)
    assert [tile.end_block * 16 for tile in tiles] == [256 * (index + 1) for index in range(8)]
