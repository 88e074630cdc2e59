"""Paged attention by kernels: the backend of a GPU.

    Batch --KernelAttention.prepare--> spans, block tables, slots (host, checked once per step)
          --KernelStep.attend, per layer--> every sequence has one row: paged_attention_decode, which stores K and V too
                `-- else reshape_and_cache into the pool, in place, and behind it
                    |-- sequences of one row, and those of few rows: paged_attention_decode
                    `-- prompt chunks: paged_attention_prefill, or MLX's attention where that is faster (paged_tuning)

Kernels write the pool in place, so each of its buffers belongs to an `Ordered` that puts every access behind the one
before. Layers that the kernels do not take attend as in `gathered`, over the same pool; one log line says why. All
layers of a buffer have one shape, so no buffer is written both ways.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import BlockShape, reshape_and_cache, slot_indices, unset
from pomarium.kernels.contiguous_prefill import (
    ContiguousPlan,
    contiguous_prefill,
    contiguous_refusal,
    plan_contiguous,
)
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered
from pomarium.kernels.paged_attention import (
    MOST_DECODE_ROWS,
    AttentionShape,
    DecodePlan,
    PrefillPlan,
    decode,
    plan_decode,
    plan_prefill,
    prefill,
)
from pomarium.kernels.paged_plan import Span, checked_tables
from pomarium.kernels.paged_tuning import PREFILL, DecodeVariant
from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.gathered import GatheredStep, plan_group
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool

logger = logging.getLogger(__name__)

LAYERS_PER_START: Mapping[Family, int] = {Family.APPLE: 4, Family.CUDA: 1}
"""Layers that are built before their evaluation begins, while Python builds the next ones. Apple's is not measured."""


def starts_behind(layer: int, gpu: Gpu) -> bool:
    """Whether evaluation of what was built begins behind this layer."""
    layers = LAYERS_PER_START[gpu.family]
    return layer % layers == layers - 1


@dataclass(frozen=True)
class GroupRows:
    """The rows of a step as one cache group sees them; host data.

    Attributes:
        spans: of the sequences, in row order. tables: int32 (blocks,) of each; whoever plans with them checks them.
    """

    spans: tuple[Span, ...]
    tables: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class AttentionPlan:
    """Who computes which rows of a layer.

    Attributes:
        parts: cover each row once. order: int32 (T,), where each row stands in the parts' outputs; None if in order.
    """

    parts: tuple[DecodePlan | PrefillPlan | ContiguousPlan, ...]
    order: mx.array | None

    @property
    def stores(self) -> bool:
        """Whether attention stores the step's K and V: every sequence has one row."""
        first = self.parts[0]
        return len(self.parts) == 1 and isinstance(first, DecodePlan) and first.most_tokens == 1


def group_rows(batch: Batch, group: CacheGroup) -> GroupRows:
    """The step's rows for `group`."""
    first_rows = np.cumsum([0, *(sequence.length for sequence in batch.sequences)])
    spans = tuple(
        Span(int(first), sequence.length, sequence.start + sequence.length)
        for first, sequence in zip(first_rows[:-1], batch.sequences, strict=True)
    )
    return GroupRows(
        spans, tuple(np.array(sequence.block_tables[group.table], np.int32) for sequence in batch.sequences)
    )


def row_slots(rows: GroupRows, positions: np.ndarray, group: CacheGroup, num_blocks: int) -> np.ndarray:
    """Where K and V of every row go, int32 (T,), for `slot_indices`.

    Args:
        positions: int32 (T,), of the rows in their sequences.

    Raises:
        ValueError: if a block table does not hold its sequence, or names a block outside the pool.
    """
    stacked = checked_tables(rows.spans, rows.tables, num_blocks, group.block_size, group.window)
    row_of = np.repeat(np.arange(len(rows.spans)), [span.tokens for span in rows.spans])
    block, offset = np.divmod(positions, group.block_size)
    slots: np.ndarray = stacked[row_of, block] * group.block_size + offset
    return slots


_Part = DecodePlan | PrefillPlan | ContiguousPlan
_Planner = Callable[[Sequence[Span], Sequence[np.ndarray], AttentionShape, int | None, Gpu], _Part]


def plan_attention(
    rows: GroupRows, shape: AttentionShape, window: int | None, softcap: float | None, gpu: Gpu
) -> AttentionPlan:
    """Share the rows out: sequences of one row, of few, and prompt chunks. One row among many would share few loads."""

    def plan_chunks(
        spans: Sequence[Span], tables: Sequence[np.ndarray], shape: AttentionShape, window: int | None, gpu: Gpu
    ) -> PrefillPlan | ContiguousPlan:
        refusal = contiguous_refusal(spans, shape.head_dim, shape.dtype, window, softcap)
        if PREFILL[gpu.family].contiguous and refusal is None:
            return plan_contiguous(spans, tables, shape.num_kv_heads, shape.block_size, window)
        return plan_prefill(spans, tables, shape, window, gpu)

    kinds: tuple[list[int], list[int], list[int]] = ([], [], [])
    for index, span in enumerate(rows.spans):
        few = span.tokens * shape.group <= MOST_DECODE_ROWS
        kinds[0 if span.tokens == 1 else 1 if few else 2].append(index)
    planners: tuple[_Planner, ...] = (plan_decode, plan_decode, plan_chunks)
    parts: list[_Part] = []
    computed: list[np.ndarray] = []
    for kind, plan in zip(kinds, planners, strict=True):
        if kind:
            spans = [rows.spans[index] for index in kind]
            parts.append(plan(spans, [rows.tables[index] for index in kind], shape, window, gpu))
            computed += [np.arange(span.first_token, span.first_token + span.tokens) for span in spans]
    place = np.concatenate(computed)
    in_order = bool((place == np.arange(len(place))).all())
    return AttentionPlan(tuple(parts), None if in_order else mx.array(np.argsort(place).astype(np.int32)))


PlanKey = tuple[int, AttentionShape, float | None]
"""Cache group, shape and soft-cap: layers that agree in these attend by one plan."""


@dataclass(frozen=True)
class Kernels:
    """What all steps share.

    Attributes:
        blocks: of each layer that kernels take. ordered: of each such layer's buffer, by the buffer's number.
        asked: the plans that layers have asked for so far, the same in every step of a model.
    """

    pool: PagedPool
    launcher: Launcher
    gpu: Gpu
    blocks: dict[int, BlockShape]
    ordered: dict[int, Ordered]
    asked: dict[PlanKey, None] = field(default_factory=dict)


class StepPlans(Protocol):
    """Where the rows of a step go, and who attends for them."""

    def slots(self, group: int) -> mx.array:
        """Of every row, for `reshape_and_cache`."""
        ...

    def attention(self, key: PlanKey) -> AttentionPlan:
        """For the layers of `key`."""
        ...

    def by_operations(self) -> GatheredStep:
        """For the layers that the kernels do not take."""
        ...


class BatchPlans:
    """Plans of a step, each made when a layer first asks for it."""

    def __init__(self, kernels: Kernels, batch: Batch) -> None:
        """Raises ValueError as `row_slots` does."""
        self._kernels = kernels
        self._batch = batch
        layout = kernels.pool.layout
        self._rows = [group_rows(batch, group) for group in layout.groups]
        count = layout.num_blocks
        self._slots = [
            slot_indices(row_slots(rows, batch.positions, group, count), count * group.block_size)
            for rows, group in zip(self._rows, layout.groups, strict=True)
        ]
        self._made: dict[PlanKey, AttentionPlan] = {}
        self._gathered: GatheredStep | None = None

    def slots(self, group: int) -> mx.array:
        """See StepPlans.slots."""
        return self._slots[group]

    def attention(self, key: PlanKey) -> AttentionPlan:
        """See StepPlans.attention."""
        if key not in self._made:
            group, shape, softcap = key
            window = self._kernels.pool.layout.groups[group].window
            self._made[key] = plan_attention(self._rows[group], shape, window, softcap, self._kernels.gpu)
            self._kernels.asked[key] = None
        return self._made[key]

    def by_operations(self) -> GatheredStep:
        """See StepPlans.by_operations."""
        if self._gathered is None:
            pool = self._kernels.pool
            self._gathered = GatheredStep(pool, [plan_group(self._batch, group) for group in pool.layout.groups])
        return self._gathered


class KernelStep:
    """Attention of one step (see `base.StepAttention`)."""

    def __init__(self, kernels: Kernels, plans: StepPlans, ordered: Mapping[int, Ordered], *, starts: bool) -> None:
        """Args:
        ordered: each buffer that kernels take, by its number. starts: evaluation begins while layers are still built.
        """
        self._kernels = kernels
        self._plans = plans
        self._ordered = ordered
        self._starts = starts
        self._layout = kernels.pool.layout
        self._group_index = self._layout.group_index

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend`."""
        blocks = self._kernels.blocks.get(layer)
        if blocks is None:
            return self._plans.by_operations().attend(layer, queries, keys, values, scoring)
        dtype = self._kernels.pool.dtype
        own = keys.astype(dtype), values.astype(dtype)
        plan = self._plan(layer, blocks, queries, scoring)
        if not plan.stores:
            slots = self._plans.slots(self._group_index[layer])
            reshape_and_cache(self._kernels.launcher, self._buffer(layer), blocks, *own, slots)
        return self._attend(layer, plan, queries, own, scoring, store=plan.stores)

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        """See `base.StepAttention.attend_shared`."""
        blocks = self._kernels.blocks.get(layer)
        if blocks is None:
            return self._plans.by_operations().attend_shared(layer, queries, keys, values, scoring)
        dtype, plan = self._kernels.pool.dtype, self._plan(layer, blocks, queries, scoring)
        return self._attend(layer, plan, queries, (keys.astype(dtype), values.astype(dtype)), scoring, store=False)

    def _plan(self, layer: int, blocks: BlockShape, queries: mx.array, scoring: Scoring) -> AttentionPlan:
        shape = attention_shape(blocks, queries.shape[1])
        return self._plans.attention((self._group_index[layer], shape, scoring.softcap))

    def _attend(
        self,
        layer: int,
        plan: AttentionPlan,
        queries: mx.array,
        own: tuple[mx.array, mx.array],
        scoring: Scoring,
        *,
        store: bool,
    ) -> mx.array:
        """Attend over the pool. own: K and V of the step's rows, of the pool's dtype. store: they are not in it yet."""
        launcher = self._kernels.launcher
        rows = queries.astype(self._kernels.pool.dtype), *own

        def read(arrays: tuple[mx.array, ...], token: mx.array) -> tuple[mx.array, mx.array]:
            outputs = []
            for part in plan.parts:
                if isinstance(part, DecodePlan):
                    output, token = decode(launcher, part, rows[0], arrays, scoring, token, own if store else None)
                elif isinstance(part, PrefillPlan):
                    output, token = prefill(launcher, part, rows[0], arrays, scoring, token)
                else:
                    output, token = contiguous_prefill(part, rows, arrays, scoring, token)
                outputs.append(output)
            joined = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
            return joined if plan.order is None else joined[plan.order], token

        out = self._buffer(layer).access(read).astype(queries.dtype)
        if self._starts and starts_behind(layer, self._kernels.gpu):
            mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out

    def _buffer(self, layer: int) -> Ordered:
        return self._ordered[self._layout.buffer_of_layer[layer]]

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend_latents`."""
        return self._plans.by_operations().attend_latents(layer, queries, latents, rank, scoring)


class KernelAttention:
    """Backend over a PagedPool (see `base.AttentionBackend`).

    Attributes:
        kernels: what all steps share.
        whole: kernels take every layer, so that all accesses of the pool stand in one order and a step may be queued
            behind one that has not ended.
    """

    def __init__(self, pool: PagedPool, launcher: Launcher, gpu: Gpu) -> None:
        """Take over the buffers of `pool` that the kernels take; nobody else may read or write them."""
        layout = pool.layout
        reasons = {layer: unsupported(layout, pool.dtype, layer) for layer in range(len(layout.layers))}
        taken = [layer for layer, reason in reasons.items() if reason is None]
        layer_of_buffer = {layout.buffer_of_layer[layer]: layer for layer in taken}
        ordered = {buffer: Ordered(*pool.keys_and_values(layer)) for buffer, layer in layer_of_buffer.items()}
        blocks = {layer: block_shape(layout, pool.dtype, layer) for layer in taken}
        self.kernels = Kernels(pool, launcher, gpu, blocks, ordered)
        self.whole = len(taken) == len(layout.layers)
        _log_unsupported(reasons)

    @property
    def in_graphs(self) -> "KernelGraphs | None":
        """See `base.AttentionBackend.in_graphs`."""
        return KernelGraphs(self.kernels) if self.whole else None

    @property
    def arrays(self) -> list[mx.array]:
        """See `base.AttentionBackend.arrays`."""
        tokens = [array for ordered in self.kernels.ordered.values() for array in ordered.arrays]
        return [*self.kernels.pool.arrays, *tokens]

    def prepare(self, batch: Batch) -> KernelStep:
        """See `base.AttentionBackend.prepare`. Raises ValueError if a block table does not hold its sequence."""
        return KernelStep(self.kernels, BatchPlans(self.kernels, batch), self.kernels.ordered, starts=True)


@dataclass(frozen=True)
class PlanRoom:
    """Shapes of one plan. partitions, width: of its work list and its tables."""

    key: PlanKey
    variant: DecodeVariant
    partitions: int
    width: int


class KernelGraphs:
    """Attention of decode steps as part of a graph (see `base.InGraphs`)."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    @property
    def ordered(self) -> list[Ordered]:
        """See InGraphs.ordered."""
        return list(self._kernels.ordered.values())

    def bucket(self, batch: Batch, rows: int) -> tuple[tuple[PlanRoom, ...], list[list[mx.array]]] | None:
        """See InGraphs.bucket. The arrays are tables, work, reduce and ints of each plan."""
        groups = self._kernels.pool.layout.groups
        found = [group_rows(batch, group) for group in groups]
        rooms, arrays = [], []
        for key in self._kernels.asked:
            index, shape, _ = key
            spans, tables = found[index].spans, found[index].tables
            plan = plan_decode(spans, tables, shape, groups[index].window, self._kernels.gpu, padded=True)
            rooms.append(PlanRoom(key, plan.variant, plan.items, plan.tables.size // rows))
            arrays.append([plan.tables, plan.work, plan.reduce, plan.ints])
        return (tuple(rooms), arrays) if rooms else None

    def step(
        self,
        rows: int,
        agreed: tuple[PlanRoom, ...],
        arrays: Sequence[Sequence[mx.array]],
        ordered: Sequence[Ordered],
    ) -> KernelStep:
        """See InGraphs.step."""
        buffers = dict(zip(self._kernels.ordered, ordered, strict=True))
        return KernelStep(self._kernels, _GivenPlans(rows, agreed, arrays), buffers, starts=False)


class _GivenPlans:
    """StepPlans whose arrays are a graph's inputs."""

    def __init__(self, rows: int, agreed: Sequence[PlanRoom], plans: Sequence[Sequence[mx.array]]) -> None:
        self._plans = {
            place.key: AttentionPlan(
                (DecodePlan(place.key[1], place.variant, rows, rows, 1, place.partitions, *arrays),), None
            )
            for place, arrays in zip(agreed, plans, strict=True)
        }

    def slots(self, group: int) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError("where each sequence has one row, attention stores it")

    def attention(self, key: PlanKey) -> AttentionPlan:
        """See StepPlans.attention."""
        return self._plans[key]

    def by_operations(self) -> GatheredStep:
        """Raises RuntimeError."""
        raise RuntimeError("attention by operations has no graph that serves another step")


def block_shape(layout: CacheLayout, dtype: mx.Dtype, layer: int) -> BlockShape:
    """Of the buffer that holds `layer`."""
    cache, block_size = layout.layers[layer], layout.group_of(layer).block_size
    value_dim = 0 if cache.latent else cache.value_dim
    return BlockShape(layout.num_blocks, cache.num_kv_heads, block_size, cache.head_dim, value_dim, dtype)


def attention_shape(blocks: BlockShape, num_heads: int) -> AttentionShape:
    """Of a layer with `num_heads` query heads whose values are as wide as its keys."""
    return AttentionShape(
        num_heads, blocks.num_kv_heads, blocks.key_dim, blocks.num_blocks, blocks.block_size, blocks.dtype
    )


def paged_pool(layout: CacheLayout, dtype: mx.Dtype, launcher: Launcher) -> PagedPool:
    """A pool whose buffers are not zeroed where kernels take their layers, for those read no row that nobody wrote.

    What attends by operations copies whole blocks and gives what is too much in them no weight, which takes numbers
    there: 0 * NaN is NaN.
    """

    def make(layer: int, shape: tuple[int, int]) -> mx.array:
        taken = unsupported(layout, dtype, layer) is None
        return unset(launcher, shape, dtype)[0] if taken else mx.zeros(shape, dtype)

    return PagedPool(layout, dtype, make)


def unsupported(layout: CacheLayout, dtype: mx.Dtype, layer: int) -> str | None:
    """Why the kernels do not take a layer; None if they do."""
    cache = layout.layers[layer]
    if cache.latent or cache.value_dim != cache.head_dim:
        kept = "latents" if cache.latent else f"values of {cache.value_dim} elements to keys of {cache.head_dim}"
        return f"it keeps {kept}"
    blocks = block_shape(layout, dtype, layer)
    return attention_shape(blocks, cache.num_kv_heads).unsupported or blocks.unsupported


def _log_unsupported(reasons: dict[int, str | None]) -> None:
    found: dict[str, list[int]] = {}
    for layer, reason in reasons.items():
        if reason is not None:
            found.setdefault(reason, []).append(layer)
    if found:
        parts = [f"{reason} ({_layers(layers)})" for reason, layers in found.items()]
        logger.info("attention of some layers is left to MLX operations: %s", "; ".join(parts))


def _layers(layers: Sequence[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers from {layers[0]}"
