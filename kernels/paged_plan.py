"""Which part of which sequence each threadgroup of a paged attention kernel takes: pure decisions on the host.

    Span (a sequence's query tokens) + block tables --checked_tables--> refused, or one array, within the pool
    spans --partition--> runs of keys, of about one length whatever the mix, as many as keep the GPU busy
          --decode_work, reduce_work, prefill_work--> the kernels' index arrays

Made once per step and cache group; every layer of the group shares the arrays.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np

MOST_ITEMS = 65535
"""Threadgroups along y of a grid, CUDA's limit."""

LEAST_WIDTH = 32
"""Blocks in a padded table: the first 512 tokens of a sequence at 16 to a block have one width."""


@dataclass(frozen=True)
class Span:
    """A sequence's query tokens in a step: its last `tokens` ones.

    Attributes:
        first_token: row of the step where they begin. context: keys that the last of them sees, itself included.
    """

    first_token: int
    tokens: int
    context: int

    def first_key(self, window: int | None) -> int:
        """The first key that any of them sees."""
        return 0 if window is None else max(0, self.context - self.tokens + 1 - window)


def checked_tables(
    spans: Sequence[Span], tables: Sequence[np.ndarray], num_blocks: int, block_size: int, window: int | None
) -> np.ndarray:
    """int32 (S, longest), the tables padded with 0; what would make a kernel read outside the pool is refused.

    Args:
        tables: of each span, integers (blocks,).

    Raises:
        ValueError: if a sequence has no token, is longer than its table, or needs a block that the pool does not have.
    """
    if not spans or len(tables) != len(spans):
        raise ValueError(f"{len(tables)} block tables do not fit {len(spans)} sequences")
    widths = np.array([len(table) for table in tables])
    ends = np.array([span.context for span in spans])
    counts = np.array([span.tokens for span in spans])
    if counts.min() < 1 or (counts > ends).any():
        worst = int(np.argmax(counts - ends)) if (counts > ends).any() else int(np.argmin(counts))
        raise ValueError(f"sequence {worst} has {counts[worst]} query tokens within a context of {ends[worst]}")
    if (ends > widths * block_size).any():
        worst = int(np.argmax(ends - widths * block_size))
        raise ValueError(
            f"a context of {ends[worst]} tokens is longer than its block table: {widths[worst]} blocks of {block_size}"
        )
    stacked = np.zeros((len(tables), widths.max()), np.int32)
    for row, table in zip(stacked, tables, strict=True):
        row[: len(table)] = table
    begins = np.array([span.first_key(window) for span in spans])
    column = np.arange(stacked.shape[1])
    needed = (column >= begins[:, None] // block_size) & (column < -(-ends[:, None] // block_size))
    wrong = needed & ((stacked < 0) | (stacked >= num_blocks))
    if wrong.any():
        row, at = np.argwhere(wrong)[0]
        raise ValueError(
            f"block table {stacked.shape} names block {stacked[row, at]} at [{row}, {at}], outside a pool of "
            f"{num_blocks}"
        )
    return stacked


def partition(
    spans: Sequence[Span], window: int | None, wanted: int, quantum: int, bounds: tuple[int, int]
) -> np.ndarray:
    """Cut the keys of each span into partitions of nearly equal size.

    Args:
        wanted: partitions that run at once; there are about so many, or a multiple of it.
        quantum: partitions are multiples of it, but a span's last. bounds: least and most keys in one, about.

    Returns:
        int64 (items, 3): span, first key, key behind the last; a span's items stand together, in order.
    """
    begins = np.array([span.first_key(window) for span in spans], np.int64)
    ends = np.array([span.context for span in spans], np.int64)
    lengths = ends - begins
    total, wanted = int(lengths.sum()), max(1, wanted)
    waves = -(-total // (wanted * bounds[1]))
    least = max(bounds[0], -(-total // max(1, MOST_ITEMS - len(spans))))
    cuts = [_cut(lengths, max(least, size), quantum) for size in (-(-total // (wanted * waves)), bounds[1])]
    # Whichever ends first: counts are rounded up, and a few partitions too many begin one more wave.
    counts, steps = min(cuts, key=lambda cut: -(-int(cut[0].sum()) // wanted) * int(cut[1].max()))
    span = np.repeat(np.arange(len(spans)), counts)
    first = np.cumsum(counts) - counts
    start = begins[span] + (np.arange(len(span)) - first[span]) * steps[span]
    return np.stack([span, start, np.minimum(start + steps[span], ends[span])], axis=1)


def _cut(lengths: np.ndarray, size: int, quantum: int) -> tuple[np.ndarray, np.ndarray]:
    """Partitions of each length, of at most `size` keys if that is a multiple of `quantum`, and the keys in each."""
    counts = -(-lengths // size)
    even = -(-lengths // counts)
    steps = -(-even // quantum) * quantum
    return -(-lengths // steps), steps


def room(count: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, ...: what `count` of something is padded to."""
    power = 1 << max(0, count - 1).bit_length()
    return power * 3 // 4 if power >= 32 and count <= power * 3 // 4 else power


def room_of_tables(blocks: int) -> int:
    """The width that tables of up to `blocks` blocks are padded to: LEAST_WIDTH, or the next power of two."""
    return max(LEAST_WIDTH, 1 << max(0, blocks - 1).bit_length())


@lru_cache(maxsize=1024)
def room_of_items(
    sequences: int, longest: int, window: int | None, wanted: int, quantum: int, bounds: tuple[int, int]
) -> int:
    """What the partitions of one token each of `sequences` are padded to, if all sequences had `longest` keys.

    Shorter ones have fewer as a rule: so the room stays while sequences grow. Arguments as `partition`.
    """
    spans = [Span(index, 1, longest) for index in range(sequences)]
    return room(len(partition(spans, window, wanted, quantum, bounds)))


def decode_work(spans: Sequence[Span], items: np.ndarray) -> np.ndarray:
    """int32 (items, 8), see paged_attention_decode.metal."""
    facts = np.array([(index, s.first_token, s.tokens, s.context) for index, s in enumerate(spans)], np.int32)
    work = np.zeros((len(items), 8), np.int32)
    work[:, :4] = facts[items[:, 0]]
    work[:, 4:6] = items[:, 1:]
    return work


def reduce_work(spans: Sequence[Span], items: np.ndarray) -> np.ndarray:
    """int32 (tokens, 4), see paged_attention_reduce.metal; tokens of the spans, one span after another."""
    counts = np.bincount(items[:, 0], minlength=len(spans))
    first = np.cumsum(counts) - counts
    tokens = np.array([span.tokens for span in spans])
    span = np.repeat(np.arange(len(spans)), tokens)
    work = np.zeros((len(span), 4), np.int32)
    work[:, 0], work[:, 1] = first[span], counts[span]
    work[:, 2] = np.arange(len(span)) - (np.cumsum(tokens) - tokens)[span]
    return work


def prefill_work(spans: Sequence[Span], group: int, rows: int) -> np.ndarray:
    """int32 (tiles, 8), see paged_attention_prefill.metal; the tiles with most keys first.

    Args:
        group: query heads of a KV head; a token is that many rows. rows: of a tile.
    """
    tiles = [
        (index, span.first_token, span.tokens, span.context, first, placed, 0, 0)
        for index, (span, placed) in enumerate(zip(spans, _placed(spans), strict=True))
        for first in range(0, span.tokens * group, rows)
    ]
    work = np.array(tiles, np.int32)
    last_token = np.minimum((work[:, 4] + rows - 1) // group, work[:, 2] - 1)
    most_first: np.ndarray = work[np.argsort(work[:, 2] - work[:, 3] - last_token, kind="stable")]
    return most_first


def _placed(spans: Sequence[Span]) -> list[int]:
    """Output row of each span's first token, the spans standing one after another."""
    return [0, *accumulate(span.tokens for span in spans)][:-1]
