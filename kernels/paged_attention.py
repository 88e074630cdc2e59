"""Attention over the paged pool by kernels: few query tokens per sequence (decode), or prompt chunks (prefill).

    spans + block tables --plan_decode, once per step--> DecodePlan --decode, per layer--> outputs, token
                                    `-- paged_attention_decode: each partition of each sequence's keys; it stores the
                                        step's own K and V where each sequence has one token
                                    `-- paged_attention_reduce: a row's partitions together, sinks
    spans + block tables --plan_prefill, once per step--> PrefillPlan --prefill, per layer--> outputs, token

Both read a pool that reshape_and_cache wrote, the step's own K and V included, but for what decode is given to store,
and are causal: token i of a span of n sees keys up to context - n + i. `AttentionShape.unsupported` says what they do
not take; what they compute is defined by reference.grouped_attention. Bad input is refused here, on the host, before
any launch: index arrays when they are planned, once per step, and the shapes of a layer's arrays when it is launched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import DTYPES, padded_ints
from pomarium.kernels.gpu_family import Gpu
from pomarium.kernels.launch import KernelSource, Launch, Launcher
from pomarium.kernels.paged_plan import (
    Span,
    checked_tables,
    decode_work,
    partition,
    prefill_work,
    reduce_work,
    room,
    room_of_items,
    room_of_tables,
)
from pomarium.kernels.paged_tuning import (
    DECODE,
    DecodeVariant,
    PrefillVariant,
    decode_variant,
    prefill_variant,
)
from pomarium.kernels.reference import Scoring

HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256, 512)
BLOCK_SIZES = (8, 16, 32)

MOST_DECODE_ROWS = 32
"""Rows (tokens x heads of a group) of a sequence up to which decode takes it: above, prefill fills its tiles."""

DECODE_SOURCE = KernelSource(
    "paged_attention_decode",
    ("q", "own_k", "own_v", "keys", "values", "tables", "work", "ints", "floats", "after"),
    ("partial", "stats", "token"),
    ("keys", "values"),
)
REDUCE_SOURCE = KernelSource("paged_attention_reduce", ("partial", "stats", "sinks", "work", "ints"), ("out",))
PREFILL_SOURCE = KernelSource(
    "paged_attention_prefill",
    ("q", "keys", "values", "sinks", "tables", "work", "ints", "floats", "after"),
    ("out", "token"),
)
SOURCES: tuple[KernelSource, ...] = (DECODE_SOURCE, REDUCE_SOURCE, PREFILL_SOURCE)


@dataclass(frozen=True)
class AttentionShape:
    """Of one layer and its pool.

    Attributes:
        num_heads, num_kv_heads, head_dim: of queries, keys and values. num_blocks, block_size, dtype: of the pool.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    num_blocks: int
    block_size: int
    dtype: mx.Dtype

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def unsupported(self) -> str | None:
        """Why the kernels do not take it; None if they do."""
        if self.num_heads % self.num_kv_heads:
            return f"{self.num_heads} query heads are no multiple of {self.num_kv_heads} KV heads"
        if self.head_dim not in HEAD_DIMS:
            return f"head size {self.head_dim} is not one of {', '.join(map(str, HEAD_DIMS))}"
        if self.block_size not in BLOCK_SIZES:
            return f"block size {self.block_size} is not one of {', '.join(map(str, BLOCK_SIZES))}"
        if self.dtype not in DTYPES:
            return f"dtype {self.dtype} is not one of float32, float16, bfloat16"
        if self.num_blocks * self.num_kv_heads * self.block_size >= 1 << 31:
            return f"a pool of {self.num_blocks * self.num_kv_heads * self.block_size} rows is over 2^31"
        return None


@dataclass(frozen=True)
class DecodePlan:
    """Index arrays of a step's decode spans, and how the kernels are specialised for them.

    Attributes:
        tokens: of all spans, and those that they are padded to. end_token: row of the step behind their last.
        most_tokens: of one span. items: partitions.
    """

    shape: AttentionShape
    variant: DecodeVariant
    tokens: int
    end_token: int
    most_tokens: int
    items: int
    tables: mx.array
    work: mx.array
    reduce: mx.array
    ints: mx.array


@dataclass(frozen=True)
class PrefillPlan:
    """Index arrays of a step's prompt chunks, and how the kernel is specialised for them."""

    shape: AttentionShape
    variant: PrefillVariant
    tokens: int
    end_token: int
    tiles: int
    tables: mx.array
    work: mx.array
    ints: mx.array


def plan_decode(
    spans: Sequence[Span],
    tables: Sequence[np.ndarray],
    shape: AttentionShape,
    window: int | None,
    gpu: Gpu,
    *,
    padded: bool = False,
) -> DecodePlan:
    """Plan attention of spans of few tokens.

    Args:
        tables: of each span, int32 (blocks,). window: tokens that a query sees, itself included; None for all.
        padded: the spans are of one token each, in the order of their rows, and are followed by others that see no key,
            whose outputs are zeros; tables and partitions are padded, too. So the arrays of unlike steps have few
            shapes (paged_plan.room), and a graph that takes them as inputs serves many steps.

    Raises:
        ValueError: if the shape is unsupported or a table does not hold its span (see `paged_plan.checked_tables`).
    """
    stacked = _checked(spans, tables, shape, window)
    most_tokens = max(span.tokens for span in spans)
    variant = decode_variant(gpu, shape.dtype, shape.head_dim, shape.group * most_tokens)
    tuning = DECODE[gpu.family]
    chunks = -(-shape.group * most_tokens // variant.rows)
    wanted = gpu.cores * tuning.threadgroups // (shape.num_kv_heads * chunks)
    cut = wanted, max(variant.keys, shape.block_size), tuning.keys
    items = partition(spans, window, *cut)
    tokens, count, width = sum(span.tokens for span in spans), len(items), stacked.shape[1]
    end_token = max(span.first_token + span.tokens for span in spans)
    work, reduce = decode_work(spans, items), reduce_work(spans, items)
    if padded:
        if end_token != tokens or most_tokens > 1:
            raise ValueError(f"{len(spans)} spans of {tokens} tokens up to row {end_token} are not one token each")
        tokens = end_token = room(tokens)
        width = room_of_tables(width)
        # A span of no tokens has nothing to do, and a token without partitions comes out as zeros.
        count = max(room(count), room_of_items(tokens, width * shape.block_size, window, *cut))
        stacked, work, reduce = _grown(stacked, tokens, width), _grown(work, count, 8), _grown(reduce, tokens, 4)
    return DecodePlan(
        shape,
        variant,
        tokens,
        end_token,
        most_tokens,
        count,
        padded_ints(stacked),
        padded_ints(work),
        padded_ints(reduce),
        padded_ints(np.array([most_tokens, width, window or 0])),
    )


def _grown(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """`table`, int32 with two axes, with zeros behind its rows and columns. np.pad takes ten times as long."""
    grown = np.zeros((rows, columns), np.int32)
    grown[: table.shape[0], : table.shape[1]] = table
    return grown


def plan_prefill(
    spans: Sequence[Span], tables: Sequence[np.ndarray], shape: AttentionShape, window: int | None, gpu: Gpu
) -> PrefillPlan:
    """Plan attention of prompt chunks. Arguments and errors as `plan_decode`."""
    stacked = _checked(spans, tables, shape, window)
    variant = prefill_variant(gpu, shape.dtype, shape.head_dim)
    work = prefill_work(spans, shape.group, variant.rows)
    return PrefillPlan(
        shape,
        variant,
        sum(span.tokens for span in spans),
        max(span.first_token + span.tokens for span in spans),
        len(work),
        padded_ints(stacked),
        padded_ints(work),
        padded_ints(np.array([0, stacked.shape[1], window or 0])),
    )


def _checked(
    spans: Sequence[Span], tables: Sequence[np.ndarray], shape: AttentionShape, window: int | None
) -> np.ndarray:
    if shape.unsupported is not None:
        raise ValueError(shape.unsupported)
    return checked_tables(spans, tables, shape.num_blocks, shape.block_size, window)


REDUCE_SIMDGROUPS = 4
"""Per threadgroup of paged_attention_reduce."""


def decode(
    launcher: Launcher,
    plan: DecodePlan,
    queries: mx.array,
    pool: tuple[mx.array, ...],
    scoring: Scoring,
    after: mx.array,
    store: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Attention of the plan's spans.

    Args:
        queries: (T, num_heads, head_dim), all rows of the step. pool: keys and values, (rows, head_dim) each.
        after: token int32 (1,) of the pool's last access.
        store: keys and values (T, num_kv_heads, head_dim) of all rows of the step, of which the plan's spans, of one
            token each, are not in the pool yet and are stored; None: the pool holds all that is attended.

    Returns:
        (plan.tokens, num_heads, head_dim), one span after another, and the token of this access.

    Raises:
        ValueError: if an array does not fit the plan.
    """
    shape, variant = plan.shape, plan.variant
    _check_arrays(shape, queries, pool, scoring, plan.end_token)
    if store is not None:
        _check_stored(plan, store)
    chunks = -(-shape.group * plan.most_tokens // variant.rows)
    threads = 32 * variant.simdgroups
    partial_shape = (plan.items, plan.most_tokens, shape.num_heads)
    # Without anything to store the kernel reads neither own_k nor own_v; the queries stand in for them.
    own, factors = store or (queries, queries), _factors(scoring.scale, scoring.softcap)
    partial, stats, token = launcher.launch(
        DECODE_SOURCE,
        Launch(
            (queries, *own, *pool, plan.tables, plan.work, plan.ints, factors, after),
            (
                ("T", shape.dtype),
                ("D", shape.head_dim),
                ("BS", shape.block_size),
                ("HK", shape.num_kv_heads),
                ("G", shape.group),
                ("R", variant.rows),
                ("LANES", variant.lanes),
                ("U", variant.unroll),
                ("NSG", variant.simdgroups),
                ("CAP", scoring.softcap is not None),
                ("STORE", store is not None),
            ),
            (threads * shape.num_kv_heads * chunks, plan.items, 1),
            (threads, 1, 1),
            (
                ((*partial_shape, shape.head_dim), mx.float32),
                ((*partial_shape, 2), mx.float32),
                ((1,), mx.int32),
            ),
        ),
    )
    (out,) = launcher.launch(
        REDUCE_SOURCE,
        Launch(
            (partial, stats, _sinks(scoring), plan.reduce, plan.ints),
            (
                ("T", shape.dtype),
                ("D", shape.head_dim),
                ("SINKS", scoring.sinks is not None),
                ("NSG", REDUCE_SIMDGROUPS),
            ),
            (32 * REDUCE_SIMDGROUPS * shape.num_heads, plan.tokens, 1),
            (32 * REDUCE_SIMDGROUPS, 1, 1),
            (((plan.tokens, shape.num_heads, shape.head_dim), shape.dtype),),
        ),
    )
    return out, token


def prefill(
    launcher: Launcher,
    plan: PrefillPlan,
    queries: mx.array,
    pool: tuple[mx.array, ...],
    scoring: Scoring,
    after: mx.array,
) -> tuple[mx.array, mx.array]:
    """Attention of the plan's prompt chunks. Arguments, results and errors as `decode`."""
    shape, variant = plan.shape, plan.variant
    _check_arrays(shape, queries, pool, scoring, plan.end_token)
    threads, factors = 32 * variant.simdgroups, _factors(scoring.scale, scoring.softcap)
    out, token = launcher.launch(
        PREFILL_SOURCE,
        Launch(
            (
                queries,
                *pool,
                _sinks(scoring),
                plan.tables,
                plan.work,
                plan.ints,
                factors,
                after,
            ),
            (
                ("T", shape.dtype),
                ("D", shape.head_dim),
                ("BS", shape.block_size),
                ("HK", shape.num_kv_heads),
                ("G", shape.group),
                ("RB", variant.row_blocks),
                ("BK", variant.keys),
                ("PAD", variant.padding),
                ("NSG", variant.simdgroups),
                ("CAP", scoring.softcap is not None),
                ("SINKS", scoring.sinks is not None),
            ),
            (threads * shape.num_kv_heads, plan.tiles, 1),
            (threads, 1, 1),
            (((plan.tokens, shape.num_heads, shape.head_dim), shape.dtype), ((1,), mx.int32)),
        ),
    )
    return out, token


@lru_cache(maxsize=64)
def _factors(scale: float, softcap: float | None) -> mx.array:
    """float32 (8,): factor on the products and soft-cap, so that scores come out in units of log 2. Made once."""
    log2_e = math.log2(math.e)
    if softcap is None:
        return mx.array([scale * log2_e, *[0.0] * 7], mx.float32)
    return mx.array([scale / softcap, softcap * log2_e, *[0.0] * 6], mx.float32)


@lru_cache(maxsize=1)
def _no_sinks() -> mx.array:
    """What stands in for sinks that are not read. Made once: MLX would launch a kernel to fill it for each layer."""
    return mx.array([0.0] * 8, mx.float32)


def _sinks(scoring: Scoring) -> mx.array:
    return _no_sinks() if scoring.sinks is None else scoring.sinks


def _check_arrays(
    shape: AttentionShape, queries: mx.array, pool: tuple[mx.array, ...], scoring: Scoring, end_token: int
) -> None:
    if queries.ndim != 3 or queries.shape[1:] != (shape.num_heads, shape.head_dim) or queries.shape[0] < end_token:
        raise ValueError(
            f"queries {queries.shape} are not at least ({end_token}, {shape.num_heads}, {shape.head_dim}), as planned"
        )
    rows = shape.num_blocks * shape.num_kv_heads * shape.block_size
    for name, array in zip(("keys", "values"), pool, strict=True):
        if array.shape != (rows, shape.head_dim):
            raise ValueError(f"{name} {array.shape} are not ({rows}, {shape.head_dim}), as planned")
    if any(array.dtype != shape.dtype for array in (queries, *pool)):
        raise ValueError(
            f"queries of {queries.dtype} and a pool of {pool[0].dtype} and {pool[1].dtype} are not all {shape.dtype}"
        )
    if scoring.sinks is not None and scoring.sinks.shape != (shape.num_heads,):
        raise ValueError(f"sinks {scoring.sinks.shape} are not one per query head ({shape.num_heads},)")


def _check_stored(plan: DecodePlan, store: tuple[mx.array, mx.array]) -> None:
    if plan.most_tokens > 1:
        raise ValueError(f"spans of up to {plan.most_tokens} tokens are stored by reshape_and_cache, not by decode")
    shape = plan.shape
    for name, array in zip(("keys", "values"), store, strict=True):
        wanted = (shape.num_kv_heads, shape.head_dim)
        if array.ndim != 3 or array.shape[1:] != wanted or array.shape[0] < plan.end_token:
            raise ValueError(
                f"{name} {array.shape} to store are not at least ({plan.end_token}, {wanted[0]}, {wanted[1]})"
            )
        if array.dtype != shape.dtype:
            raise ValueError(f"{name} of {array.dtype} to store do not fit a pool of {shape.dtype}")
