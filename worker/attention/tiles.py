"""Cutting a ragged batch into padded rectangles: pure decisions, no arrays of a device.

    sequences --cut--> Tile: a run of query rows against a run of cached blocks
              --bundle--> tiles of like shape that are computed as one padded batch

A decode row is a tile of one query. A prompt chunk is cut every MAX_QUERIES rows: an early tile then skips the keys
that only later rows see, which saves about half of a long chunk's work and bounds its scores. Bundling trades padding
for fewer operations: all decode rows of a step cost one batched product instead of one each.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

MAX_QUERIES = 256
"""Query rows per tile."""

MAX_PADDING = 1.25
"""A bundle's padded area may exceed the sum of its tiles' areas by this factor."""

CHEAP_AREA = 4096
"""Query-key pairs below which padding costs less than one more set of operations."""

MAX_KEYS = 1 << 16
"""Padded keys in a bundle: bounds the gathered copy (at 8 KV heads of 128 in bf16, 256 MiB of K and V)."""


@dataclass(frozen=True)
class Rows:
    """A sequence's rows in a step: `length` rows from `first_row`, the first at position `start`."""

    first_row: int
    start: int
    length: int


@dataclass(frozen=True)
class Tile:
    """Query rows [first_row, first_row + length) at positions `position`.. against blocks [first_block, end_block).

    Attributes:
        sequence: index of the sequence. position: position of the first query.
    """

    sequence: int
    first_row: int
    length: int
    position: int
    first_block: int
    end_block: int

    @property
    def blocks(self) -> int:
        """Blocks that the tile reads."""
        return self.end_block - self.first_block


def cut(sequences: SequenceOf[Rows], block_size: int, window: int | None) -> list[Tile]:
    """Tiles that cover each row once, each with the blocks that hold every key its rows see."""
    tiles = []
    for index, rows in enumerate(sequences):
        for offset in range(0, rows.length, MAX_QUERIES):
            length = min(MAX_QUERIES, rows.length - offset)
            position = rows.start + offset
            first_key = 0 if window is None else max(0, position - window + 1)
            end_block = -(-(position + length) // block_size)
            tiles.append(Tile(index, rows.first_row + offset, length, position, first_key // block_size, end_block))
    return tiles


def bundle(tiles: SequenceOf[Tile], block_size: int) -> list[list[Tile]]:
    """Partition tiles into bundles of like shape, within the bounds above."""
    bundles: list[list[Tile]] = []
    area = longest = widest = 0
    for tile in sorted(tiles, key=lambda tile: (tile.length, tile.blocks)):
        keys = tile.blocks * block_size
        grown_area = area + tile.length * keys
        grown_longest, grown_widest = max(longest, tile.length), max(widest, keys)
        if bundles:
            count = len(bundles[-1]) + 1
            padded = count * grown_longest * grown_widest
            fits = count * grown_widest <= MAX_KEYS
            if fits and (padded <= MAX_PADDING * grown_area or padded - grown_area <= CHEAP_AREA):
                bundles[-1].append(tile)
                area, longest, widest = grown_area, grown_longest, grown_widest
                continue
        bundles.append([tile])
        area, longest, widest = tile.length * keys, tile.length, keys
    return bundles
