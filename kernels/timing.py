"""How fast the main kernels are on this machine's GPU: for `pomarium selftest`, which has no other kernels beside it.

    Sizes --makers--> Workload (what is launched, the bytes it has to move) --time_one--> Timing

A rate is of the bytes that no way of computing could leave unread or unwritten, so it can be held against the rate of a
plain copy, which stands first. Comparisons with MLX's and PyTorch's own attention are benchmarks/kernels_gpu.py's.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels import gated_delta, mla
from pomarium.kernels.cache_writes import BlockShape, reshape_and_cache, slot_indices
from pomarium.kernels.gpu_family import Gpu
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered
from pomarium.kernels.paged_attention import AttentionShape, decode, plan_decode, plan_prefill, prefill
from pomarium.kernels.paged_plan import Span
from pomarium.kernels.reference import Scoring

DTYPE = mx.bfloat16
BLOCK = 16
ROUNDS, UNCOUNTED = 20, 3


@dataclass(frozen=True)
class Sizes:
    """What is timed.

    Attributes:
        heads, kv_heads, head_dim: of attention. sequences, context: of decode steps. prompt: tokens of a prompt.
        latent_heads: of latent attention. key_heads, value_heads, state_dim: of gated-delta layers.
        copied: elements of the plain copy.
    """

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    sequences: int = 8
    context: int = 4096
    prompt: int = 2048
    latent_heads: int = 16
    key_heads: int = 16
    value_heads: int = 32
    state_dim: int = 128
    copied: int = 1 << 27


@dataclass(frozen=True)
class Workload:
    """Attributes:
    run: queues it; the arrays to evaluate. nbytes: that it has to move.
    """

    name: str
    run: Callable[[], Sequence[mx.array]]
    nbytes: int


@dataclass(frozen=True)
class Timing:
    """Of one workload; the median."""

    name: str
    milliseconds: float
    nbytes: int

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.nbytes / self.milliseconds / 1e6


def makers(launcher: Launcher, gpu: Gpu, sizes: Sizes) -> tuple[tuple[str, Callable[[], Workload]], ...]:
    """A name for each workload, and what makes it: one after another, for each holds its arrays."""
    return (
        ("copy", lambda: _copy(sizes)),
        ("reshape_and_cache", lambda: _store(launcher, sizes)),
        ("paged_attention_decode, many", lambda: _decode(launcher, gpu, sizes, sizes.sequences)),
        ("paged_attention_decode, one", lambda: _decode(launcher, gpu, sizes, 1)),
        ("paged_attention_prefill", lambda: _prefill(launcher, gpu, sizes)),
        ("mla_decode", lambda: _latent(launcher, gpu, sizes)),
        ("gdn_recurrent_decode", lambda: _gated_delta(launcher, sizes)),
    )


def time_one(workload: Workload, rounds: int = ROUNDS) -> Timing:
    """Time one."""
    return Timing(workload.name, _median_ms(workload.run, rounds), workload.nbytes)


def _copy(sizes: Sizes) -> Workload:
    source = _random(sizes.copied)
    return Workload("copy", lambda: [source + 1], 2 * source.nbytes)


def _store(launcher: Launcher, sizes: Sizes) -> Workload:
    pool, shape = _pool(sizes, 1, sizes.prompt)
    owned = Ordered(*pool)
    blocks = BlockShape(shape.num_blocks, shape.num_kv_heads, BLOCK, shape.head_dim, shape.head_dim, DTYPE)
    rows = _random(sizes.prompt, shape.num_kv_heads, shape.head_dim)
    slots = slot_indices(np.random.default_rng(0).permutation(sizes.prompt), shape.num_blocks * BLOCK)

    def run() -> Sequence[mx.array]:
        reshape_and_cache(launcher, owned, blocks, rows, rows, slots)
        return owned.arrays

    return Workload(f"reshape_and_cache, {sizes.prompt} tokens", run, 4 * rows.nbytes)


def _decode(launcher: Launcher, gpu: Gpu, sizes: Sizes, count: int) -> Workload:
    pool, shape = _pool(sizes, count, sizes.context)
    plan = plan_decode(
        [Span(n, 1, sizes.context) for n in range(count)], _tables(count, sizes.context), shape, None, gpu
    )
    queries, token = _random(count, shape.num_heads, shape.head_dim), mx.zeros((1,), mx.int32)
    scoring = Scoring(shape.head_dim**-0.5)
    nbytes = 2 * count * sizes.context * shape.num_kv_heads * shape.head_dim * DTYPE.size
    return Workload(
        f"paged_attention_decode, {count} x {sizes.context} keys",
        lambda: decode(launcher, plan, queries, pool, scoring, token),
        nbytes,
    )


def _prefill(launcher: Launcher, gpu: Gpu, sizes: Sizes) -> Workload:
    pool, shape = _pool(sizes, 1, sizes.prompt)
    plan = plan_prefill([Span(0, sizes.prompt, sizes.prompt)], _tables(1, sizes.prompt), shape, None, gpu)
    queries, token = _random(sizes.prompt, shape.num_heads, shape.head_dim), mx.zeros((1,), mx.int32)
    scoring = Scoring(shape.head_dim**-0.5)
    return Workload(
        f"paged_attention_prefill, {sizes.prompt} tokens",
        lambda: prefill(launcher, plan, queries, pool, scoring, token),
        2 * queries.nbytes + sum(array.nbytes for array in pool),
    )


def _latent(launcher: Launcher, gpu: Gpu, sizes: Sizes) -> Workload:
    tables = _tables(sizes.sequences, sizes.context)
    width, blocks = mla.RANK + mla.ROPE, sum(map(len, tables))
    plan = mla.plan(
        np.stack(tables),
        np.full(sizes.sequences, sizes.context, np.int32),
        heads=sizes.latent_heads,
        dtype=DTYPE,
        block_size=BLOCK,
        num_blocks=blocks,
        gpu=gpu,
    )
    latents, queries = _random(blocks * BLOCK, width), _random(sizes.sequences, sizes.latent_heads, width)
    return Workload(
        f"mla_decode, {sizes.sequences} x {sizes.context} latents",
        lambda: mla.decode(launcher, plan, queries, latents, width**-0.5, mx.zeros((1,), mx.int32)),
        latents.nbytes,
    )


def _gated_delta(launcher: Launcher, sizes: Sizes) -> Workload:
    count, dim = sizes.sequences, sizes.state_dim
    shape = gated_delta.GatedDeltaShape(sizes.key_heads, sizes.value_heads, dim, dim, 4, count, DTYPE)
    states = mx.random.normal((count, sizes.value_heads, dim, dim))
    mx.eval(states)
    pool, nbytes = Ordered(states), 2 * states.nbytes
    slots = np.repeat(np.arange(count)[:, None], 2, axis=1)
    plan = gated_delta.plan(np.ones(count, np.int64), slots, count)
    qkv, gates = _random(count, shape.channels), _random(count, sizes.value_heads)
    heads = _random(sizes.value_heads)

    def run() -> Sequence[mx.array]:
        y = gated_delta.recurrent(launcher, pool, shape, plan, qkv, gates, gates, heads, heads)
        return [y, *pool.arrays]

    return Workload(f"gdn_recurrent_decode, {count} states", run, nbytes)


def _pool(sizes: Sizes, count: int, context: int) -> tuple[tuple[mx.array, mx.array], AttentionShape]:
    blocks = count * -(-context // BLOCK)
    rows = blocks * sizes.kv_heads * BLOCK
    shape = AttentionShape(sizes.heads, sizes.kv_heads, sizes.head_dim, blocks, BLOCK, DTYPE)
    return (_random(rows, sizes.head_dim), _random(rows, sizes.head_dim)), shape


def _tables(count: int, context: int) -> list[np.ndarray]:
    """Scrambled, as after a day of serving."""
    blocks = np.random.default_rng(0).permutation(count * -(-context // BLOCK)).astype(np.int32)
    return np.split(blocks, count)


def _random(*shape: int) -> mx.array:
    array = mx.random.normal(shape).astype(DTYPE)
    mx.eval(array)
    return array


def _median_ms(run: Callable[[], Sequence[mx.array]], rounds: int) -> float:
    taken = []
    for number in range(UNCOUNTED + rounds):
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(run())
        mx.synchronize()
        if number >= UNCOUNTED:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken) * 1e3
