"""Paged attention as MLX operations: write the rows' K and V, gather blocks, attend in padded bundles.

    Batch --tiles--> GroupPlan (index arrays, per cache group) --attend--> per bundle: gather, QK, mask, softmax, PV

The path of the CPU device, and what the kernels are compared with. Padded rows are dropped when rows are put back in
order.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.kernels.reference import MASKED, Scoring, grouped_attention
from pomarium.worker.attention.tiles import Rows, Tile, bundle, cut
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool


@dataclass(frozen=True)
class BundlePlan:
    """Index arrays of one bundle of S tiles, padded to Q queries and B blocks (L = B x block_size keys).

    Attributes:
        rows: int32 (S x Q,), query row for each padded place; None if they are all rows, in order.
        blocks: int32 (S, B), block ids. bias: float32 (S, 1, 1, Q, L), 0 where a query sees a key, else MASKED.
    """

    rows: mx.array | None
    blocks: mx.array
    bias: mx.array


@dataclass(frozen=True)
class GroupPlan:
    """Index arrays of one cache group.

    Attributes:
        slots: int32 (T, 2), block and offset in the block where each row's K and V go.
        bundles: of the sequences that attend.
        order: int32, for each of their rows where its output stands in the bundles' outputs, one after another; None if
            in order.
    """

    slots: np.ndarray
    bundles: tuple[BundlePlan, ...]
    order: mx.array | None


def plan_group(batch: Batch, group: CacheGroup, attending: SequenceOf[int] | None = None) -> GroupPlan:
    """Plan the step for the layers of `group`.

    Args:
        attending: which of the batch's sequences attend, in order; None for all. The others' K and V are stored only.
    """
    tables = [np.array(sequence.block_tables[group.table], np.int32) for sequence in batch.sequences]
    rows, first = [], 0
    slots = np.empty((len(batch.token_ids), 2), np.int32)
    for sequence, table in zip(batch.sequences, tables, strict=True):
        rows.append(Rows(first, sequence.start, sequence.length))
        positions = batch.positions[first : first + sequence.length]
        slots[first : first + sequence.length, 0] = table[positions // group.block_size]
        slots[first : first + sequence.length, 1] = positions % group.block_size
        first += sequence.length
    if attending is not None:
        rows, tables = [rows[index] for index in attending], [tables[index] for index in attending]
    bundles = bundle(cut(rows, group.block_size, group.window), group.block_size)
    plans = tuple(_plan_bundle(tiles, tables, group, first) for tiles in bundles)
    return GroupPlan(slots, plans, _order(bundles, rows))


def _order(bundles: SequenceOf[SequenceOf[Tile]], rows: SequenceOf[Rows]) -> mx.array | None:
    """See GroupPlan.order."""
    chosen = np.concatenate([np.arange(r.first_row, r.first_row + r.length) for r in rows]) if rows else np.zeros(0)
    place_of_row, place = np.empty(int(chosen.max(initial=-1)) + 1, np.int32), 0
    for tiles in bundles:
        longest = max(tile.length for tile in tiles)
        for tile in tiles:
            place_of_row[tile.first_row : tile.first_row + tile.length] = np.arange(place, place + tile.length)
            place += longest
    order = place_of_row[chosen.astype(np.int64)]
    in_order = place == len(order) and bool((order == np.arange(place)).all())
    return None if in_order else mx.array(order)


def _plan_bundle(tiles: SequenceOf[Tile], tables: list[np.ndarray], group: CacheGroup, total_rows: int) -> BundlePlan:
    queries, width = max(tile.length for tile in tiles), max(tile.blocks for tile in tiles)
    lengths = np.array([tile.length for tile in tiles])[:, None]
    step = np.arange(queries)[None]
    rows = np.array([tile.first_row for tile in tiles])[:, None] + np.minimum(step, lengths - 1)
    blocks = np.zeros((len(tiles), width), np.int32)
    for row, tile in zip(blocks, tiles, strict=True):
        row[: tile.blocks] = tables[tile.sequence][tile.first_block : tile.end_block]
    query = np.array([tile.position for tile in tiles])[:, None] + step
    key = np.array([tile.first_block * group.block_size for tile in tiles])[:, None] + np.arange(
        width * group.block_size
    )
    seen = key[:, None] <= query[:, :, None]
    if group.window is not None:
        seen &= key[:, None] > query[:, :, None] - group.window
    bias = np.where(seen, np.float32(0), np.float32(MASKED))[:, None, None]
    flat = rows.reshape(-1).astype(np.int32)
    all_rows = flat.size == total_rows and bool((flat == np.arange(total_rows)).all())
    return BundlePlan(None if all_rows else mx.array(flat), mx.array(blocks), mx.array(bias))


class Blocks(Protocol):
    """A pool, as `GatheredStep` uses it: see PagedPool."""

    @property
    def layout(self) -> CacheLayout:
        """Of its buffers."""
        ...

    def write(self, layer: int, rows: mx.array, keys: mx.array, values: mx.array | None) -> None:
        """See PagedPool.write."""
        ...

    def read(self, layer: int, blocks: mx.array) -> tuple[mx.array, mx.array]:
        """See PagedPool.read."""
        ...


class GatheredStep:
    """Attention of one step over a pool (see `base.StepAttention`)."""

    def __init__(self, pool: Blocks, plans: SequenceOf[GroupPlan]) -> None:
        self._pool = pool
        self._plans = plans
        self._group_index = pool.layout.group_index
        # Layers of a group nearly always agree in their number of KV heads: the index arrays per head are made once.
        self._slots: dict[tuple[int, int], mx.array] = {}
        self._blocks: dict[tuple[int, int], list[mx.array]] = {}

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """See `base.StepAttention.attend`."""
        self._pool.write(layer, self._head_slots(self._group_index[layer], keys.shape[1]), keys, values)
        return self.attend_cached(layer, queries, scoring)

    def attend_shared(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        """See `base.StepAttention.attend_shared`."""
        return self.attend_cached(layer, queries, scoring)

    def attend_latents(
        self,
        layer: int,
        queries: mx.array,
        latents: mx.array,
        rank: int,
        scoring: Scoring,
    ) -> mx.array:
        """See `base.StepAttention.attend_latents`."""
        self._pool.write(layer, self._head_slots(self._group_index[layer], 1), latents[:, None], None)
        return self.attend_cached(layer, queries, scoring)

    def attend_cached(self, layer: int, queries: mx.array, scoring: Scoring) -> mx.array:
        """As `base.StepAttention.attend` over what is stored, the rows' own K and V included.

        Returns:
            (R, num_heads, value_dim) of the R rows of the sequences that attend in this layer's plan, R > 0.
        """
        group, kv_heads = self._group_index[layer], self._pool.layout.layers[layer].num_kv_heads
        plan, outputs = self._plans[group], []
        for bundle_plan, blocks in zip(plan.bundles, self._head_blocks(group, kv_heads), strict=True):
            k, v = self._pool.read(layer, blocks)
            q = queries if bundle_plan.rows is None else queries[bundle_plan.rows]
            outputs.append(grouped_attention(q, k, v, bundle_plan.bias, scoring))
        rows = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        rows = rows if plan.order is None else rows[plan.order]
        # Computed while Python builds the next layers: a decode step of SmolLM2 took 57 ms instead of 65.
        mx.async_eval(rows)  # type: ignore[no-untyped-call]
        return rows

    def _head_slots(self, group: int, kv_heads: int) -> mx.array:
        """int32 (T, kv_heads): row of the pool's flat buffer for each token and head."""
        if (group, kv_heads) not in self._slots:
            block, offset = self._plans[group].slots.T
            block_size = self._pool.layout.groups[group].block_size
            rows = (block[:, None] * kv_heads + np.arange(kv_heads)) * block_size + offset[:, None]
            self._slots[group, kv_heads] = mx.array(rows.astype(np.int32))
        return self._slots[group, kv_heads]

    def _head_blocks(self, group: int, kv_heads: int) -> list[mx.array]:
        """For each bundle int32 (S, kv_heads, B): index of each head's part of a block."""
        if (group, kv_heads) not in self._blocks:
            heads = mx.arange(kv_heads, dtype=mx.int32)[None, :, None]
            self._blocks[group, kv_heads] = [
                plan.blocks[:, None] * kv_heads + heads for plan in self._plans[group].bundles
            ]
        return self._blocks[group, kv_heads]


class GatheredAttention:
    """Backend over a PagedPool (see `base.AttentionBackend`)."""

    in_graphs = None

    def __init__(self, pool: PagedPool) -> None:
        self._pool = pool

    @property
    def arrays(self) -> list[mx.array]:
        """See `base.AttentionBackend.arrays`."""
        return self._pool.arrays

    def prepare(self, batch: Batch) -> GatheredStep:
        """See `base.AttentionBackend.prepare`."""
        return GatheredStep(self._pool, [plan_group(batch, group) for group in self._pool.layout.groups])
