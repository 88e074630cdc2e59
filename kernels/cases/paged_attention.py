"""Sample launches of the paged attention kernels, and what they have to give: for tests, and for a real GPU.

    Workload --attend(launcher)--> reshape_and_cache into a scrambled pool, then decode or prefill --> outputs, the pool
             --expected----------> float64 numpy over contiguous K and V

The pool holds NaN wherever nothing was written, and block tables hold no more blocks than they need: a key too many, or
one of the wrong block, shows.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import mlx.core as mx
import numpy as np

from pomarium.kernels.cache_writes import BlockShape, padded_ints, reshape_and_cache, slot_indices
from pomarium.kernels.cases.case import Case
from pomarium.kernels.cases.order import LAST_TOKEN, ordered
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import indices_behind
from pomarium.kernels.paged_attention import AttentionShape, DecodePlan, decode, plan_decode, plan_prefill, prefill
from pomarium.kernels.paged_plan import Span, decode_work, reduce_work
from pomarium.kernels.reference import Scoring

BOUNDS = {mx.float32: 5e-6, mx.float16: 3e-3, mx.bfloat16: 2.4e-2}
"""Largest error against float64, of inputs of N(0, 1): what rounding the result costs, for a result of up to 4.5."""

SPARE_BLOCKS = 3

OTHER_ROWS = 2
"""Of the step, before those that are attended: not-a-numbers."""

SMALL = Gpu(Family.CUDA, 2)


class Stage(StrEnum):
    """Which kernels."""

    DECODE = "decode"
    PREFILL = "prefill"


@dataclass(frozen=True)
class Workload:
    """What is attended.

    Attributes:
        spans: of each sequence, query tokens and keys that the last of them sees.
        peak: the first query token's own key is 40 times the query of each group's first head, which thus sees little
            else, while other heads of the group may not see it at all.
        cuts: partitions instead of those that are planned, each a span, its first key and the key behind its last one;
            keys in none of them are not attended.
        stores: decode stores the last key of each sequence, which has one token.
        gpu: whose variant is launched, and for how many cores; any GPU runs it.
    """

    stage: Stage
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    dtype: mx.Dtype
    spans: tuple[tuple[int, int], ...]
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    peak: bool = False
    cuts: tuple[tuple[int, int, int], ...] = ()
    stores: bool = False
    gpu: Gpu = SMALL
    seed: int = 0

    @property
    def name(self) -> str:
        """For a report."""
        extras = [f"window {self.window}"] if self.window is not None else []
        extras += ["soft-cap"] if self.softcap is not None else []
        extras += ["sinks"] if self.sinks else []
        extras += ["peak"] if self.peak else []
        extras += ["cut anywhere"] if self.cuts else []
        extras += ["stores"] if self.stores else []
        heads = f"{self.num_kv_heads}x{self.group} heads of {self.head_dim}"
        kind = str(self.dtype).removeprefix("mlx.core.")
        parts = [f"paged_attention_{self.stage}", kind, heads, f"block {self.block_size}", self.gpu.family, *extras]
        return ", ".join(parts)


@dataclass(frozen=True)
class Operands:
    """A workload's arrays. `keys`, `values`: (all tokens, num_kv_heads, head_dim), sequence after sequence."""

    queries: mx.array
    keys: mx.array
    values: mx.array
    scoring: Scoring
    spans: tuple[Span, ...]
    tables: tuple[np.ndarray, ...]
    slots: np.ndarray
    num_blocks: int


def operands(workload: Workload) -> Operands:
    """Random, from the workload's seed."""
    rng = np.random.default_rng(workload.seed)
    needed = [-(-context // workload.block_size) for _, context in workload.spans]
    num_blocks = sum(needed) + SPARE_BLOCKS
    scrambled = rng.permutation(num_blocks).astype(np.int32)
    tables = tuple(np.split(scrambled[: sum(needed)], np.cumsum(needed)[:-1]))
    positions = [np.arange(context) for _, context in workload.spans]
    size = workload.block_size
    slots = np.concatenate([t[p // size] * size + p % size for t, p in zip(tables, positions, strict=True)])
    first = np.cumsum([OTHER_ROWS, *(tokens for tokens, _ in workload.spans)])
    spans = tuple(Span(int(row), *span) for row, span in zip(first[:-1], workload.spans, strict=True))
    heads, total = workload.num_kv_heads * workload.group, len(slots)

    def normal(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32)).astype(workload.dtype)

    sinks = normal(heads) if workload.sinks else None
    nobody = mx.full((OTHER_ROWS, heads, workload.head_dim), float("nan"), workload.dtype)
    queries = mx.concatenate([nobody, normal(int(first[-1]) - OTHER_ROWS, heads, workload.head_dim)])
    keys = normal(total, workload.num_kv_heads, workload.head_dim)
    if workload.peak:
        ends = np.cumsum([context for _, context in workload.spans])
        own = mx.array(ends - np.array([tokens for tokens, _ in workload.spans]))
        keys[own] = queries[mx.array(first[:-1])][:, :: workload.group] * 40
    return Operands(
        queries,
        keys,
        normal(total, workload.num_kv_heads, workload.head_dim),
        Scoring(workload.head_dim**-0.5, sinks, workload.softcap),
        spans,
        tables,
        slots,
        num_blocks,
    )


def attend(workload: Workload, launcher: Launcher) -> list[mx.array]:
    """The kernels' result, (query tokens, heads, head_dim), the pool's token behind them, and what it then holds of
    each token of each sequence, (tokens, 2, num_kv_heads, head_dim)."""
    given = operands(workload)
    heads, dim, size = workload.num_kv_heads, workload.head_dim, workload.block_size
    shape = AttentionShape(heads * workload.group, heads, dim, given.num_blocks, size, workload.dtype)
    rows = given.num_blocks * heads * size
    buffers = [mx.full((rows, dim), float("nan"), workload.dtype) for _ in range(2)]
    mx.eval(buffers)
    pool = ordered(*buffers)
    blocks = BlockShape(given.num_blocks, heads, size, dim, dim, workload.dtype)
    last = np.cumsum([context for _, context in workload.spans]) - 1
    held = given.slots.copy()
    if workload.stores:
        held[last] = -1
    reshape_and_cache(launcher, pool, blocks, given.keys, given.values, slot_indices(held, given.num_blocks * size))
    arguments = given.spans, given.tables, shape, workload.window, workload.gpu
    if workload.stage is Stage.DECODE:
        plan = _cut(plan_decode(*arguments), workload.cuts, given.spans)
        nobody = mx.full((OTHER_ROWS, heads, dim), float("nan"), workload.dtype)
        own = [mx.concatenate([nobody, rows[mx.array(last)]]) for rows in (given.keys, given.values)]
        store = (own[0], own[1]) if workload.stores else None
        out = pool.access(
            lambda arrays, after: decode(launcher, plan, given.queries, arrays, given.scoring, after, store)
        )
    else:
        chunks = plan_prefill(*arguments)
        out = pool.access(lambda arrays, after: prefill(launcher, chunks, given.queries, arrays, given.scoring, after))
    token = pool.token

    def kept(buffers: tuple[mx.array, ...], after: mx.array) -> tuple[mx.array, mx.array]:
        places = indices_behind(mx.array(given.slots.astype(np.int32)), after)
        wanted = [buffer.reshape(-1, heads, size, dim)[places // size, :, places % size] for buffer in buffers]
        return mx.stack(wanted, axis=1), after

    return [out, token, pool.access(kept)]


def _cut(plan: DecodePlan, cuts: tuple[tuple[int, int, int], ...], spans: tuple[Span, ...]) -> DecodePlan:
    if not cuts:
        return plan
    items = np.array(cuts)
    work, reduce = padded_ints(decode_work(spans, items)), padded_ints(reduce_work(spans, items))
    return replace(plan, items=len(items), work=work, reduce=reduce)


def expected(workload: Workload) -> list[np.ndarray]:
    """The same in float64."""
    given = operands(workload)
    queries, keys, values = (_double(array) for array in (given.queries, given.keys, given.values))
    keys, values = (np.repeat(array, workload.group, axis=1) for array in (keys, values))
    sinks = None if given.scoring.sinks is None else _double(given.scoring.sinks)
    out, first = np.zeros((len(queries) - OTHER_ROWS, *queries.shape[1:])), 0
    for index, span in enumerate(given.spans):
        parts = [np.arange(begin, end) for part, begin, end in workload.cuts if part == index]
        attended = np.concatenate(parts) if workload.cuts else np.arange(span.context)
        for token in range(span.tokens):
            end = span.context - span.tokens + 1 + token
            begin = 0 if workload.window is None else max(0, end - workload.window)
            row, seen = span.first_token + token, first + attended[(attended >= begin) & (attended < end)]
            if not len(seen):
                continue
            scores = np.einsum("hd,khd->hk", queries[row], keys[seen]) * given.scoring.scale
            if workload.softcap is not None:
                scores = workload.softcap * np.tanh(scores / workload.softcap)
            top = scores.max(-1) if sinks is None else np.maximum(scores.max(-1), sinks)
            weights = np.exp(scores - top[:, None])
            total = weights.sum(-1) if sinks is None else weights.sum(-1) + np.exp(sinks - top)
            out[row - OTHER_ROWS] = np.einsum("hk,khd->hd", weights / total[:, None], values[seen])
        first += span.context
    kept = np.stack([_double(given.keys), _double(given.values)], axis=1)
    return [out, np.array([LAST_TOKEN]), kept]


def _double(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


_MIX = ((1, 1), (1, 37), (1, 130), (1, 64))
_FEW = ((3, 40), (1, 1), (2, 129))
_CHUNKS = ((21, 21), (1, 9), (34, 90))
_CUTS = ((0, 39, 40), (1, 0, 13), (1, 13, 14), (1, 14, 97), (1, 97, 130))

F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16
D, P = Stage.DECODE, Stage.PREFILL
APPLE = Gpu(Family.APPLE, 1)

WORKLOADS: tuple[Workload, ...] = (
    Workload(D, 2, 4, 128, 16, BF16, _MIX),
    Workload(D, 2, 4, 128, 16, BF16, _FEW, gpu=APPLE),
    Workload(D, 1, 8, 64, 8, F16, _MIX, window=40, sinks=True),
    Workload(D, 3, 1, 80, 32, F32, _FEW, gpu=APPLE),
    Workload(D, 1, 5, 96, 16, F16, _MIX, softcap=20.0, gpu=APPLE),
    Workload(D, 1, 16, 112, 8, BF16, _MIX),
    Workload(D, 2, 3, 192, 32, F32, _FEW, window=5),
    Workload(D, 1, 2, 256, 16, F16, _FEW, softcap=5.0, sinks=True),
    Workload(D, 1, 4, 512, 8, F32, _MIX),
    Workload(D, 1, 1, 512, 32, F32, ((1, 37),)),
    Workload(D, 1, 4, 64, 8, F16, _FEW, peak=True),
    Workload(D, 2, 2, 64, 16, F32, ((2, 40), (1, 130)), cuts=_CUTS),
    Workload(D, 2, 4, 128, 16, BF16, _MIX, stores=True),
    Workload(D, 1, 8, 64, 8, F32, _MIX, window=40, sinks=True, stores=True, gpu=APPLE),
    Workload(D, 3, 20, 80, 32, F16, _MIX, stores=True),
    Workload(D, 1, 1, 64, 32, F16, ((1, 2300), (1, 300)), sinks=True, peak=True, gpu=Gpu(Family.CUDA, 40)),
    Workload(P, 2, 4, 128, 16, BF16, _CHUNKS),
    Workload(P, 1, 8, 64, 8, F16, _CHUNKS, window=11, sinks=True, gpu=APPLE),
    Workload(P, 2, 1, 80, 32, F32, _CHUNKS, gpu=APPLE),
    Workload(P, 1, 3, 96, 16, F16, _CHUNKS, softcap=20.0),
    Workload(P, 1, 5, 112, 8, BF16, _CHUNKS),
    Workload(P, 1, 2, 192, 32, F32, _CHUNKS, window=30),
    Workload(P, 1, 2, 256, 16, F16, _CHUNKS, softcap=5.0, sinks=True),
    Workload(P, 1, 1, 512, 8, F32, _CHUNKS),
    Workload(P, 1, 1, 64, 16, F32, ((34, 90), (3, 3)), window=66, gpu=APPLE),
    Workload(P, 1, 4, 64, 8, F16, _CHUNKS, peak=True),
)
"""Every head size, block size and dtype, each feature, the variants of both GPU families, over 32 partitions of one
sequence, partitions that end within a tile, a row without any key, and a simdgroup whose first key is the last one of a
tile."""


def cases(seed: int = 0) -> Iterator[Case]:
    """One case per workload, with fresh random arrays for each seed."""
    for workload in WORKLOADS:
        chosen = replace(workload, seed=seed)
        yield Case(chosen.name, partial(attend, chosen), partial(expected, chosen), BOUNDS[chosen.dtype])
