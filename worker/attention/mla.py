"""Latent attention with its kernel: sequences of one row take mla_decode, the others of the step MLX operations.

    Batch --LatentKernelAttention.prepare--> LatentKernelStep --attend_latents--> store the rows' latents
                                                 |-- one row (decode): kernels.mla.decode over the pool
                                                 `-- more rows (prompt chunks): GatheredStep

MLX's own scatter writes the pool, so the graph orders it before the kernel that reads it. Layers that the kernel does
not take attend as in `gathered`; one log line says why.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels import mla
from pomarium.kernels.gpu_family import Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.attention.gathered import GatheredStep, plan_group
from pomarium.worker.attention.kernels import starts_behind
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.layout import CacheGroup
from pomarium.worker.kv_cache.pool import PagedPool

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kernel:
    launcher: Launcher
    gpu: Gpu


class LatentKernelAttention:
    """Backend over a PagedPool (see `base.AttentionBackend`)."""

    def __init__(self, pool: PagedPool, launcher: Launcher, gpu: Gpu) -> None:
        self._pool = pool
        self._kernel = _Kernel(launcher, gpu)
        reasons = [_unsupported(pool, group) for group in pool.layout.groups]
        self._taken = frozenset(index for index, reason in enumerate(reasons) if reason is None)
        if found := sorted({reason for reason in reasons if reason is not None}):
            logger.info("the MLA kernel leaves layers to MLX operations: %s", "; ".join(found))

    @property
    def arrays(self) -> list[mx.array]:
        """See `base.AttentionBackend.arrays`."""
        return self._pool.arrays

    def prepare(self, batch: Batch) -> StepAttention:
        """See `base.AttentionBackend.prepare`."""
        groups = self._pool.layout.groups
        single = [index for index, sequence in enumerate(batch.sequences) if sequence.length == 1]
        if not single or not self._taken:
            return GatheredStep(self._pool, [plan_group(batch, group) for group in groups])
        rest = [index for index, sequence in enumerate(batch.sequences) if sequence.length > 1]
        plans = [plan_group(batch, group, rest if index in self._taken else None) for index, group in enumerate(groups)]
        gathered = GatheredStep(self._pool, plans)
        return LatentKernelStep(self._pool, self._kernel, self._taken, gathered, batch, single)


def _unsupported(pool: PagedPool, group: CacheGroup) -> str | None:
    for layer in (pool.layout.layers[index] for index in group.layers):
        if not layer.latent or group.window is not None:
            return "they keep no latents, or attend within a window"
        rank, rope_dim = layer.value_dim, layer.head_dim - layer.value_dim
        reason = mla.unsupported(rank=rank, rope_dim=rope_dim, block_size=group.block_size, dtype=pool.dtype)
        if reason is not None:
            return reason
    return None


class LatentKernelStep:
    """Attention of one step, with sequences of one row among others (see `base.StepAttention`)."""

    def __init__(
        self,
        pool: PagedPool,
        kernel: _Kernel,
        taken: frozenset[int],
        gathered: GatheredStep,
        batch: Batch,
        single: Sequence[int],
    ) -> None:
        """Args:
        taken: cache groups whose sequences of one row go to the kernel; `gathered` attends for the rest of them.
        single: the batch's sequences of one row.
        """
        self._pool = pool
        self._kernel = kernel
        self._taken = taken
        self._gathered = gathered
        self._sequences = [batch.sequences[index] for index in single]
        first_rows = np.cumsum([0, *(sequence.length for sequence in batch.sequences)])
        rows = first_rows[single]
        self._rows: mx.array | None = None
        if len(rows) < len(batch.token_ids):
            others = np.setdiff1d(np.arange(len(batch.token_ids)), rows)
            self._rows = mx.array(rows.astype(np.int32))
            self._order = mx.array(np.argsort(np.concatenate([rows, others])).astype(np.int32))
        self._group_index = pool.layout.group_index
        self._plans: dict[tuple[int, int], mla.DecodePlan] = {}

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend`."""
        return self._gathered.attend(layer, queries, keys, values, scoring)

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        """See `base.StepAttention.attend_shared`."""
        return self._gathered.attend_shared(layer, queries, keys, values, scoring)

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend_latents`."""
        group = self._group_index[layer]
        if group not in self._taken:
            return self._gathered.attend_latents(layer, queries, latents, rank, scoring)
        if scoring.sinks is not None or scoring.softcap is not None:
            raise ValueError("latent attention has neither sinks nor a soft cap")
        self._gathered.store_latents(layer, latents)
        plan, pool = self._plan(group, queries.shape[1]), self._pool.latents(layer)
        single = (queries if self._rows is None else queries[self._rows]).astype(self._pool.dtype)
        out = mla.decode(self._kernel.launcher, plan, single, pool, scoring.scale).astype(queries.dtype)
        if self._rows is not None:
            out = mx.concatenate([out, self._gathered.attend_cached(layer, queries, scoring)])[self._order]
        if starts_behind(layer, self._kernel.gpu):
            mx.async_eval(out)  # type: ignore[no-untyped-call]
        return out

    def _plan(self, group: int, heads: int) -> mla.DecodePlan:
        if (group, heads) not in self._plans:
            facts, layout = self._pool.layout.groups[group], self._pool.layout
            lengths = np.array([sequence.start + 1 for sequence in self._sequences], np.int32)
            # A table that does not hold its sequence shows as blocks of -1, which mla.plan refuses.
            tables = np.full((len(lengths), -(-int(lengths.max()) // facts.block_size)), -1, np.int32)
            for row, sequence in zip(tables, self._sequences, strict=True):
                held = sequence.block_tables[facts.table][: len(row)]
                row[: len(held)] = held
            self._plans[group, heads] = mla.plan(
                tables,
                lengths,
                heads=heads,
                dtype=self._pool.dtype,
                block_size=facts.block_size,
                num_blocks=layout.num_blocks,
                gpu=self._kernel.gpu,
            )
        return self._plans[group, heads]
