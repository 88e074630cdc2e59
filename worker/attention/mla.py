"""Latent attention by its kernel: rows' latents are stored in the pool in place, and sequences of one row attend there.

    Batch --LatentKernelAttention.prepare--> LatentKernelStep --attend_latents--> reshape_and_cache, and behind it
                                                 |-- one row (decode): kernels.mla.decode over the pool
                                                 `-- more rows (prompt chunks): GatheredStep over what it copies out

Each buffer belongs to an `Ordered`, which puts every access behind the one before. The kernel takes all layers of a
model or none (`refusal`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from pomarium.kernels import mla
from pomarium.kernels.cache_writes import BlockShape, reshape_and_cache, slot_indices
from pomarium.kernels.gpu_family import Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered, indices_behind, token_behind
from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.attention.gathered import GatheredStep, plan_group
from pomarium.worker.attention.kernels import block_shape, group_rows, row_slots, starts_behind
from pomarium.worker.batch import Batch
from pomarium.worker.batch import Sequence as SequenceRows
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool, gathered

PlanKey = tuple[int, int]
"""Cache group and number of heads: layers that agree in these attend by one plan."""


@dataclass(frozen=True)
class Latents:
    """What all steps share.

    Attributes:
        ordered: each buffer of the pool, by its number. asked: the plans that layers have asked for so far.
    """

    pool: PagedPool
    launcher: Launcher
    gpu: Gpu
    ordered: dict[int, Ordered]
    asked: dict[PlanKey, None] = field(default_factory=dict)

    def plan(self, sequences: Sequence[SequenceRows], key: PlanKey, rows: int | None = None) -> mla.DecodePlan:
        """Of sequences of one row each; padded to `rows`. Raises ValueError as `mla.plan`."""
        group, heads = self.pool.layout.groups[key[0]], key[1]
        lengths = np.array([sequence.start + 1 for sequence in sequences], np.int32)
        # A table that does not hold its sequence shows as blocks of -1, which mla.plan refuses.
        tables = np.full((len(lengths), -(-int(lengths.max()) // group.block_size)), -1, np.int32)
        for row, sequence in zip(tables, sequences, strict=True):
            held = sequence.block_tables[group.table][: len(row)]
            row[: len(held)] = held
        return mla.plan(
            tables,
            lengths,
            heads=heads,
            dtype=self.pool.dtype,
            block_size=group.block_size,
            num_blocks=self.pool.layout.num_blocks,
            gpu=self.gpu,
            rows=rows,
        )

    def slots(self, batch: Batch, group: CacheGroup, rows: int | None = None) -> mx.array:
        """Of every row, for `reshape_and_cache`; up to `rows` nothing is stored. Raises ValueError as `row_slots`."""
        count = self.pool.layout.num_blocks
        slots = row_slots(group_rows(batch, group), batch.positions, group, count)
        if rows is not None:
            slots = np.concatenate([slots, np.full(rows - len(slots), -1)])
        return slot_indices(slots, count * group.block_size)


class LatentKernelAttention:
    """Backend over a PagedPool (see `base.AttentionBackend`)."""

    def __init__(self, pool: PagedPool, launcher: Launcher, gpu: Gpu) -> None:
        """Take over the buffers of `pool`; nobody else may read or write them. Raises ValueError where `refusal` does
        not let it."""
        if (reason := refusal(pool)) is not None:
            raise ValueError(f"the MLA kernel does not take {reason}")
        layout = pool.layout
        layer_of_buffer = {layout.buffer_of_layer[layer]: layer for layer in range(len(layout.layers))}
        ordered = {buffer: Ordered(pool.latents(layer)) for buffer, layer in layer_of_buffer.items()}
        self._latents = Latents(pool, launcher, gpu, ordered)

    @property
    def in_graphs(self) -> "LatentGraphs":
        """See `base.AttentionBackend.in_graphs`."""
        return LatentGraphs(self._latents)

    @property
    def arrays(self) -> list[mx.array]:
        """See `base.AttentionBackend.arrays`."""
        return [array for ordered in self._latents.ordered.values() for array in ordered.arrays]

    def prepare(self, batch: Batch) -> StepAttention:
        """See `base.AttentionBackend.prepare`. Raises ValueError if a block table does not hold its sequence."""
        return LatentKernelStep(
            self._latents, BatchLatentPlans(self._latents, batch), self._latents.ordered, starts=True
        )


def refusal(pool: PagedPool) -> str | None:
    """Why the kernel does not take a pool's layers; None if it takes all."""
    for group in pool.layout.groups:
        for layer in (pool.layout.layers[index] for index in group.layers):
            if not layer.latent or group.window is not None:
                return "layers that keep no latents, or attend within a window"
            rank, rope_dim = layer.value_dim, layer.head_dim - layer.value_dim
            reason = mla.unsupported(rank=rank, rope_dim=rope_dim, block_size=group.block_size, dtype=pool.dtype)
            if reason is not None:
                return reason
    return None


@dataclass(frozen=True)
class Shares:
    """Which rows of a step go where, if there are sequences of one row and others: int32 arrays.

    Attributes:
        single: rows of sequences of one row. order: where each row stands behind those, and the others behind them.
    """

    single: mx.array
    order: mx.array


class BatchLatentPlans:
    """What the layers of a step share, each part made when one first asks for it."""

    def __init__(self, latents: Latents, batch: Batch) -> None:
        """Raises ValueError as `Latents.slots`."""
        layout = latents.pool.layout
        self._latents = latents
        self._slots = [latents.slots(batch, group) for group in layout.groups]
        single = [index for index, sequence in enumerate(batch.sequences) if sequence.length == 1]
        rest = [index for index, sequence in enumerate(batch.sequences) if sequence.length > 1]
        self._sequences = [batch.sequences[index] for index in single]
        self.chunks = [plan_group(batch, group, rest) for group in layout.groups] if rest else None
        self.shares: Shares | None = None
        if single and rest:
            first_rows = np.cumsum([0, *(sequence.length for sequence in batch.sequences)])
            rows = first_rows[single].astype(np.int32)
            others = np.setdiff1d(np.arange(len(batch.token_ids)), rows)
            self.shares = Shares(mx.array(rows), mx.array(np.argsort(np.concatenate([rows, others])).astype(np.int32)))
        self._made: dict[PlanKey, mla.DecodePlan] = {}

    def slots(self, group: int) -> mx.array:
        """Of every row, for `reshape_and_cache`."""
        return self._slots[group]

    def decode(self, key: PlanKey) -> mla.DecodePlan | None:
        """Of the sequences of one row; None if there are none."""
        self._latents.asked[key] = None
        if not self._sequences:
            return None
        if key not in self._made:
            self._made[key] = self._latents.plan(self._sequences, key)
        return self._made[key]


class GivenLatentPlans:
    """The same, of a graph whose inputs these arrays are: each sequence has one row."""

    shares = chunks = None

    def __init__(self, slots: Sequence[mx.array], plans: Mapping[PlanKey, mla.DecodePlan]) -> None:
        self._slots, self._plans = slots, plans

    def slots(self, group: int) -> mx.array:
        """See BatchLatentPlans.slots."""
        return self._slots[group]

    def decode(self, key: PlanKey) -> mla.DecodePlan:
        """See BatchLatentPlans.decode."""
        return self._plans[key]


class LatentKernelStep:
    """Attention of one step (see `base.StepAttention`)."""

    def __init__(
        self,
        latents: Latents,
        plans: BatchLatentPlans | GivenLatentPlans,
        ordered: Mapping[int, Ordered],
        *,
        starts: bool,
    ) -> None:
        """Args:
        ordered: each buffer, by its number. starts: evaluation begins while layers are still built.
        """
        self._latents, self._plans, self._ordered, self._starts = latents, plans, ordered, starts
        self._layout = latents.pool.layout
        chunks = plans.chunks
        self._chunks = None if chunks is None else GatheredStep(_CopiedOut(self._layout, ordered), chunks)

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """Raises ValueError: all layers keep latents."""
        raise ValueError(f"layer {layer} keeps latents, no keys and values")

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        """Raises ValueError: all layers keep latents."""
        raise ValueError(f"layer {layer} keeps latents, no keys and values")

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend_latents`."""
        if scoring.sinks is not None or scoring.softcap is not None:
            raise ValueError("latent attention has neither sinks nor a soft cap")
        group, dtype, launcher = self._layout.group_index[layer], self._latents.pool.dtype, self._latents.launcher
        plan, shares = self._plans.decode((group, queries.shape[1])), self._plans.shares
        buffer = self._ordered[self._layout.buffer_of_layer[layer]]
        shape: BlockShape = block_shape(self._layout, dtype, layer)
        reshape_and_cache(launcher, buffer, shape, latents[:, None].astype(dtype), None, self._plans.slots(group))
        outputs = []
        if plan is not None:
            rows = (queries if shares is None else queries[shares.single]).astype(dtype)
            outputs.append(
                buffer.access(lambda arrays, after: mla.decode(launcher, plan, rows, arrays[0], scoring.scale, after))
            )
        if self._chunks is not None:
            outputs.append(self._chunks.attend_cached(layer, queries, scoring))
        out = outputs[0] if len(outputs) == 1 else mx.concatenate([part.astype(queries.dtype) for part in outputs])
        out = (out if shares is None else out[shares.order]).astype(queries.dtype)
        if self._starts and starts_behind(layer, self._latents.gpu):
            mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out


@dataclass(frozen=True)
class _CopiedOut:
    """The pool as GatheredStep reads it: each copy is an access."""

    layout: CacheLayout
    ordered: Mapping[int, Ordered]

    def write(self, layer: int, rows: mx.array, keys: mx.array, values: mx.array | None) -> None:
        """Raises RuntimeError."""
        raise RuntimeError("a kernel writes the latents")

    def read(self, layer: int, blocks: mx.array) -> tuple[mx.array, mx.array]:
        """See PagedPool.read."""
        block_size = self.layout.group_of(layer).block_size

        def copied(arrays: tuple[mx.array, ...], after: mx.array) -> tuple[mx.array, mx.array]:
            found = gathered(arrays[0], indices_behind(blocks, after), block_size)
            return found, token_behind(after, found)

        keys = self.ordered[self.layout.buffer_of_layer[layer]].access(copied)
        return keys, keys[..., : self.layout.layers[layer].value_dim]


class LatentGraphs:
    """Latent attention of decode steps as part of a graph (see `base.InGraphs`).

    What steps agree in: of each plan its key, tasks and width of tables. Arrays: slots of each group, then of each plan
    sizes, tables, tasks and spans.
    """

    def __init__(self, latents: Latents) -> None:
        self._latents = latents

    @property
    def ordered(self) -> list[Ordered]:
        """See InGraphs.ordered."""
        return list(self._latents.ordered.values())

    def bucket(
        self, batch: Batch, rows: int
    ) -> tuple[tuple[tuple[PlanKey, int, int], ...], list[list[mx.array]]] | None:
        """See InGraphs.bucket."""
        if not self._latents.asked:
            return None
        slots = [self._latents.slots(batch, group, rows) for group in self._latents.pool.layout.groups]
        plans = {key: self._latents.plan(batch.sequences, key, rows) for key in self._latents.asked}
        agreed = tuple((key, plan.num_tasks, plan.block_tables.size) for key, plan in plans.items())
        arrays = [[plan.sizes, plan.block_tables, plan.tasks, plan.spans] for plan in plans.values()]
        return agreed, [slots, *arrays]

    def step(
        self,
        rows: int,
        agreed: tuple[tuple[PlanKey, int, int], ...],
        arrays: Sequence[Sequence[mx.array]],
        ordered: Sequence[Ordered],
    ) -> LatentKernelStep:
        """See InGraphs.step."""
        latents, layout = self._latents, self._latents.pool.layout
        plans = {
            (group, heads): mla.DecodePlan(
                heads,
                latents.pool.dtype,
                layout.groups[group].block_size,
                layout.num_blocks,
                mla.TUNINGS[latents.gpu.family],
                rows,
                tasks,
                *given,
            )
            for ((group, heads), tasks, _), given in zip(agreed, arrays[1:], strict=True)
        }
        buffers = dict(zip(latents.ordered, ordered, strict=True))
        return LatentKernelStep(latents, GivenLatentPlans(arrays[0], plans), buffers, starts=False)
