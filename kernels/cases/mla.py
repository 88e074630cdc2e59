"""A small sample of workloads of mla_decode and mla_reduce, with what float64 makes of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import mlx.core as mx
import numpy as np

from pomarium.kernels import mla
from pomarium.kernels.cases.case import Case
from pomarium.kernels.gpu_family import Gpu, this_gpu
from pomarium.kernels.launch import Launcher

BOUNDS = {mx.float32: 4e-6, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}
"""Absolute, of outputs below 4: a few units of float32's sums, and half a unit of the output's last place otherwise."""

SCALE = 0.06
UNUSED = 1 << 30
"""Block id in the unused entries of a table: reading it ends in nowhere."""


@dataclass(frozen=True)
class Workload:
    """Decode rows of S sequences over a pool with scrambled blocks; what no sequence has written is not-a-number.

    Attributes:
        lengths: tokens that each sequence's query sees. tuning: instead of the GPU's own. unused: columns of the block
            tables that no sequence needs.
    """

    lengths: tuple[int, ...]
    heads: int
    block_size: int
    dtype: mx.Dtype
    seed: int = 0
    tuning: mla.Tuning | None = None
    unused: int = 1

    @cached_property
    def block_tables(self) -> np.ndarray:
        """int32 (S, B), UNUSED behind a sequence's blocks."""
        counts = [-(-length // self.block_size) for length in self.lengths]
        blocks = np.random.default_rng(self.seed).permutation(self.num_blocks).tolist()
        tables = np.full((len(counts), max(counts) + self.unused), UNUSED, np.int32)
        for row, count in zip(tables, counts, strict=True):
            row[:count] = [blocks.pop() for _ in range(count)]
        return tables

    @property
    def num_blocks(self) -> int:
        """Of the pool, two more than needed."""
        return sum(-(-length // self.block_size) for length in self.lengths) + 2

    def slots(self, sequence: int) -> np.ndarray:
        """Rows of the pool with the tokens of `sequence`, in order."""
        tokens = np.arange(self.lengths[sequence])
        blocks = self.block_tables[sequence, tokens // self.block_size]
        return np.asarray(blocks * self.block_size + tokens % self.block_size)

    @cached_property
    def arrays(self) -> tuple[mx.array, mx.array]:
        """Queries (S, heads, rank + rope_dim) and the pool (num_blocks x block_size, rank + rope_dim)."""
        rng, width = np.random.default_rng(self.seed + 1), mla.RANK + mla.ROPE
        queries = rng.standard_normal((len(self.lengths), self.heads, width), np.float32)
        pool = np.full((self.num_blocks * self.block_size, width), np.nan, np.float32)
        for sequence, length in enumerate(self.lengths):
            pool[self.slots(sequence)] = rng.standard_normal((length, width), np.float32)
        return mx.array(queries).astype(self.dtype), mx.array(pool).astype(self.dtype)

    def run(self, launcher: Launcher, gpu: Gpu) -> mx.array:
        """The kernels' output (S, heads, rank)."""
        plan = mla.plan(
            self.block_tables,
            np.array(self.lengths, np.int32),
            heads=self.heads,
            dtype=self.dtype,
            block_size=self.block_size,
            num_blocks=self.num_blocks,
            gpu=gpu,
            tuning=self.tuning,
        )
        return mla.decode(launcher, plan, *self.arrays, SCALE, mx.zeros((1,), mx.int32))[0]

    def expected(self) -> np.ndarray:
        """The same in float64, of the rounded inputs."""
        queries, pool = (np.array(array.astype(mx.float32)).astype(np.float64) for array in self.arrays)
        out = np.empty((*queries.shape[:2], mla.RANK))
        for sequence, rows in enumerate(queries):
            latents = pool[self.slots(sequence)]
            scores = rows @ latents.T * SCALE
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[sequence] = weights / weights.sum(-1, keepdims=True) @ latents[:, : mla.RANK]
        return out


SAMPLE = (
    Workload((1,), 1, 16, mx.float32, tuning=mla.Tuning(False, 4, 8, 1, 64)),
    Workload((70, 1, 16, 33), 18, 16, mx.float16, 1, mla.Tuning(False, 4, 8, 1, 64)),
    Workload((129, 5), 16, 32, mx.bfloat16, 2, mla.Tuning(False, 2, 2, 1, 32)),
    Workload((31, 128), 3, 32, mx.float32, 3, mla.Tuning(False, 1, 8, 1, 32), unused=0),
    Workload((1, 70, 33), 40, 16, mx.float16, 4, mla.Tuning(True, 4, 8, 1, 64)),
    Workload((129, 5), 37, 32, mx.bfloat16, 5, mla.Tuning(True, 2, 8, 1, 32)),
    Workload((40,), 9, 16, mx.float32, 6, mla.Tuning(True, 2, 8, 1, 32)),
    Workload((128,), 1, 16, mx.float16, 7, mla.Tuning(True, 1, 8, 1, 32), unused=0),
)


def cases() -> Iterator[Case]:
    """Both ways: one token, ragged lengths, simdgroups that heads do not fill, many tasks and blocks, full tables."""
    gpu = this_gpu()
    for workload in SAMPLE:
        yield case(workload, gpu)


def case(workload: Workload, gpu: Gpu) -> Case:
    """A workload as a Case."""
    dtype = str(workload.dtype).rsplit(".", maxsplit=1)[-1]
    way = "" if workload.tuning is None else "matrices " if workload.tuning.matrices else "lanes "
    name = f"mla {way}{dtype} heads {workload.heads} block {workload.block_size} lengths {workload.lengths}"
    return Case(name, partial(_run, workload, gpu), lambda: [workload.expected()], BOUNDS[workload.dtype])


def _run(workload: Workload, gpu: Gpu, launcher: Launcher) -> list[mx.array]:
    return [workload.run(launcher, gpu)]
