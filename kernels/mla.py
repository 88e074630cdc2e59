"""Decode rows of absorbed multi-head latent attention over paged latents: launch of mla_decode and mla_reduce.

    block tables, context lengths --plan, once per step--> DecodePlan --decode, per layer--> outputs (S, H, rank)
                                          `-- mla_decode or mla_decode_matrix: each task's tokens, all heads
                                          `-- mla_reduce: a sequence's tasks together

A task is a part of one sequence. Tasks are as long as it takes to give the GPU enough threadgroups, whatever mix of
lengths the sequences have. Sizes that the kernel takes are in `unsupported`; choices by GPU family in TUNINGS. What the
kernel computes is defined by reference_mla.latent_attention.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import DTYPES, padded_ints
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import KernelSource, Launch, Launcher
from pomarium.kernels.paged_plan import room, room_of_tables

RANK, ROPE = 512, 64
"""Elements of a latent's value part and of its rotated key: DeepSeek-V2, -V3, GLM-4 MoE Lite."""

BLOCK_SIZES = (16, 32)

_INPUTS = ("q", "latents", "block_tables", "tasks", "iparams", "fparams", "after")
_PARTIAL = ("po", "pm", "pl")

LANES = KernelSource("mla_decode", _INPUTS, (*_PARTIAL, "token"))
MATRICES = KernelSource("mla_decode_matrix", _INPUTS, (*_PARTIAL, "token"))
REDUCE = KernelSource("mla_reduce", (*_PARTIAL, "spans"), ("out",))
SOURCES: tuple[KernelSource, ...] = (LANES, MATRICES, REDUCE)


@dataclass(frozen=True)
class Tuning:
    """Choices that change speed, not results.

    Attributes:
        matrices: products by simdgroup matrices (mla_decode_matrix) instead of lane by lane (mla_decode).
        heads: by matrices, blocks of 8 heads per threadgroup, at most 4 (2 in float32); by lanes, heads per simdgroup:
            1, 2 or 4.
        simdgroups: at most, per threadgroup, all of which share each load of a latent. By matrices 8.
        threadgroups: per core, to split sequences accordingly.
        tokens: least per task, so that writing its result costs little beside reading its latents.
    """

    matrices: bool
    heads: int
    simdgroups: int
    threadgroups: int
    tokens: int

    def heads_per_threadgroup(self, dtype: mx.Dtype) -> int:
        """At most."""
        return 8 * min(self.heads, 8 // dtype.size) if self.matrices else self.heads * self.simdgroups


TUNINGS: Mapping[Family, Tuning] = {
    # Expected, not measured: 128 registers per thread hold two blocks of heads.
    Family.APPLE: Tuning(matrices=True, heads=2, simdgroups=8, threadgroups=4, tokens=128),
    # H100: by lanes 1.0 to 2.3 times as slow.
    Family.CUDA: Tuning(matrices=True, heads=4, simdgroups=8, threadgroups=1, tokens=128),
}


def unsupported(*, rank: int, rope_dim: int, block_size: int, dtype: mx.Dtype) -> str | None:
    """Why the kernel does not take a workload; None if it does."""
    if (rank, rope_dim) != (RANK, ROPE):
        return f"latents of {rank} + {rope_dim} elements (it takes {RANK} + {ROPE})"
    if block_size not in BLOCK_SIZES:
        return f"blocks of {block_size} tokens (it takes {', '.join(map(str, BLOCK_SIZES))})"
    if dtype not in DTYPES:
        return f"dtype {dtype} (it takes float16, bfloat16 and float32)"
    return None


@dataclass(frozen=True)
class DecodePlan:
    """Index arrays of one step, the same for all layers.

    Attributes:
        heads, dtype: of the queries. block_size, num_blocks: of the pool. tuning: that it was made with.
        num_sequences, num_tasks: S and N. sizes: int32 (2,), B and the number of heads, for the kernel.
        block_tables: int32 (S, B). tasks: int32 (N, 3), sequence, first token, end. spans: int32 (S, 2), first task and
            number of tasks of each sequence. All flat, and padded to 8 elements.
    """

    heads: int
    dtype: mx.Dtype
    block_size: int
    num_blocks: int
    tuning: Tuning
    num_sequences: int
    num_tasks: int
    sizes: mx.array
    block_tables: mx.array
    tasks: mx.array
    spans: mx.array

    @property
    def head_blocks(self) -> int:
        """Threadgroups per task."""
        return _head_blocks(self.heads, self.dtype, self.tuning)


def plan(
    block_tables: np.ndarray,
    lengths: np.ndarray,
    *,
    heads: int,
    dtype: mx.Dtype,
    block_size: int,
    num_blocks: int,
    gpu: Gpu,
    tuning: Tuning | None = None,
    rows: int | None = None,
) -> DecodePlan:
    """Split S sequences into tasks.

    Args:
        block_tables: int32 (S, B), the first ceil(length / block_size) entries of each row are read.
        lengths: int32 (S,), tokens that each sequence's query sees, at least 1.
        num_blocks: of the pool. tuning: instead of the family's.
        rows: sequences that the plan is padded to, and with them tables and tasks, so that plans of many steps are of
            one shape (paged_plan.room); nobody may read the outputs of those that are too much.

    Raises:
        ValueError: a length is not within its table, or a block not within the pool, or there are more than `rows`.
    """
    if block_tables.ndim != 2 or lengths.shape != block_tables.shape[:1] or not len(lengths):
        raise ValueError(f"block tables {block_tables.shape} do not fit lengths {lengths.shape}")
    if (reason := unsupported(rank=RANK, rope_dim=ROPE, block_size=block_size, dtype=dtype)) is not None:
        raise ValueError(f"the MLA kernel does not take {reason}")
    blocks = -(-lengths // block_size)
    if lengths.min() < 1 or blocks.max() > block_tables.shape[1]:
        raise ValueError(
            f"lengths {lengths.min()} to {lengths.max()} are not within tables of {block_tables.shape[1]} blocks of "
            f"{block_size} tokens"
        )
    used = block_tables[np.arange(block_tables.shape[1]) < blocks[:, None]]
    if used.min() < 0 or used.max() >= num_blocks:
        raise ValueError(f"blocks {used.min()} to {used.max()} are not within a pool of {num_blocks}")
    tuning = tuning or TUNINGS[gpu.family]
    wanted = max(1, tuning.threadgroups * gpu.cores // _head_blocks(heads, dtype, tuning))
    part = _task_tokens(lengths, wanted, block_size, tuning.tokens)
    counts = -(-lengths // part)
    sequence = np.repeat(np.arange(len(lengths)), counts)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    start = (np.arange(counts.sum()) - first[sequence]) * part
    tasks = np.stack([sequence, start, np.minimum(start + part, lengths[sequence])], axis=1)
    spans = np.stack([first, counts], axis=1)
    if rows is not None:
        if rows < len(lengths):
            raise ValueError(f"{len(lengths)} sequences do not fit {rows} rows")
        block_tables = _padded(block_tables, rows, room_of_tables(block_tables.shape[1]))
        spans, tasks = _padded(spans, rows, 2), _padded(tasks, room(len(tasks)), 3)
    return DecodePlan(
        heads,
        dtype,
        block_size,
        num_blocks,
        tuning,
        len(spans),
        len(tasks),
        mx.array([block_tables.shape[1], heads], mx.int32),
        padded_ints(block_tables),
        padded_ints(tasks),
        padded_ints(spans),
    )


def _padded(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    padded = np.zeros((rows, columns), np.int32)
    padded[: table.shape[0], : table.shape[1]] = table
    return padded


def _task_tokens(lengths: np.ndarray, wanted: int, block_size: int, least: int) -> int:
    """Tokens per task, a multiple of the block size: the total shared out over the wanted number of tasks."""
    return -(-max(least, -(-int(lengths.sum()) // wanted)) // block_size) * block_size


def _head_blocks(heads: int, dtype: mx.Dtype, tuning: Tuning) -> int:
    return -(-heads // tuning.heads_per_threadgroup(dtype))


def decode(
    launcher: Launcher,
    plan: DecodePlan,
    queries: mx.array,
    latents: mx.array,
    scale: float,
    after: mx.array,
) -> tuple[mx.array, mx.array]:
    """Attention of one query per sequence.

    Args:
        queries: (S, H, rank + rope_dim), float16, bfloat16 or float32.
        latents: (num_blocks x block_size, rank + rope_dim), the pool, of the same dtype.
        scale: on the products. after: token int32 (1,) of the pool's last access.

    Returns:
        (S, H, rank) of the queries' dtype, and the token of this access.

    Raises:
        ValueError: shapes or dtypes that do not fit the plan or the kernel.
    """
    sequences, heads, width = plan.num_sequences, plan.heads, RANK + ROPE
    if queries.shape != (sequences, heads, width) or latents.shape != (plan.num_blocks * plan.block_size, width):
        raise ValueError(
            f"queries {queries.shape} and latents {latents.shape} do not fit {sequences} sequences of {heads} heads, "
            f"{plan.num_blocks} blocks of {plan.block_size} tokens and {width} elements"
        )
    if queries.dtype != plan.dtype or latents.dtype != plan.dtype:
        raise ValueError(f"queries of {queries.dtype} and latents of {latents.dtype} do not fit a plan of {plan.dtype}")
    inputs = (queries, latents, plan.block_tables, plan.tasks, plan.sizes, _factor(scale), after)
    if plan.tuning.matrices:
        *partial, token = launcher.launch(MATRICES, _matrices_launch(plan, inputs))
    else:
        *partial, token = launcher.launch(LANES, _lanes_launch(plan, inputs))
    return launcher.launch(REDUCE, _reduce_launch(plan, partial))[0], token


@lru_cache(maxsize=64)
def _factor(scale: float) -> mx.array:
    """float32 (1,): factor on the products, so that scores come out in units of log 2. Made once."""
    return mx.array([scale * math.log2(math.e)], mx.float32)


def _lanes_launch(plan: DecodePlan, inputs: tuple[mx.array, ...]) -> Launch:
    simdgroups = -(-plan.heads // (plan.head_blocks * plan.tuning.heads))
    threads = 32 * simdgroups
    # Two tiles of 9 KiB.
    choices = (("HB", plan.tuning.heads), ("NSG", simdgroups), ("TT", 16 // plan.dtype.size))
    return _decode_launch(plan, inputs, choices, threads)


def _matrices_launch(plan: DecodePlan, inputs: tuple[mx.array, ...]) -> Launch:
    blocks = -(-plan.heads // (8 * plan.head_blocks))
    # A tile of 18 KiB, and of scores 2 KiB for each block of heads (6 KiB in float32).
    choices = (("HB", blocks), ("TT", 8 if plan.dtype == mx.float32 else 16))
    return _decode_launch(plan, inputs, choices, 256)


def _decode_launch(
    plan: DecodePlan, inputs: tuple[mx.array, ...], choices: tuple[tuple[str, int], ...], threads: int
) -> Launch:
    tasks = plan.num_tasks
    stats = (max(8, tasks * plan.heads),)  # MLX declares smaller inputs, of mla_reduce, in another address space
    return Launch(
        inputs=inputs,
        template=(("T", plan.dtype), ("RANK", RANK), ("ROPE", ROPE), ("BS", plan.block_size), *choices),
        grid=(threads * plan.head_blocks * tasks, 1, 1),
        threadgroup=(threads, 1, 1),
        outputs=(((tasks, plan.heads, RANK), mx.float32), (stats, mx.float32), (stats, mx.float32), ((1,), mx.int32)),
    )


def _reduce_launch(plan: DecodePlan, partial: list[mx.array]) -> Launch:
    sequences = plan.num_sequences
    return Launch(
        inputs=(*partial, plan.spans),
        template=(("T", plan.dtype), ("RANK", RANK)),
        grid=(128 * plan.heads, sequences, 1),
        threadgroup=(128, 1, 1),
        outputs=(((sequences, plan.heads, RANK), plan.dtype),),
    )
