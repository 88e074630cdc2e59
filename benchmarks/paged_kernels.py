"""Measures the paged attention kernels on this machine's GPU beside a device copy, MLX's and PyTorch's attention.

    python benchmarks/paged_kernels.py               # decode and prefill, bf16, 32/8 heads of 128, blocks of 16
    python benchmarks/paged_kernels.py --sweep       # decode with other choices than paged_tuning's, to tune by

Medians. "one call" evaluates each call by itself and so contains what MLX takes to launch it, as PyTorch's figures do;
"in a row" is a call's share of 24, each behind the one before and evaluated together, as a model's layers are. MLX and
PyTorch have K and V contiguous; of ragged lengths they compute all as long as the longest, without a mask, and GB/s are
of what is needed.
Needs mlx and numpy; PyTorch's figures only where it is installed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import mlx.core as mx
import numpy as np

from pomarium.kernels.contiguous_prefill import contiguous_prefill, plan_contiguous
from pomarium.kernels.gpu_family import Family, Gpu, this_gpu
from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
from pomarium.kernels.paged_attention import AttentionShape, decode, plan_decode, plan_prefill, prefill
from pomarium.kernels.paged_plan import Span
from pomarium.kernels.paged_tuning import DECODE, DecodeTuning
from pomarium.kernels.reference import Scoring

HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 16
DTYPE = mx.bfloat16
SCORING = Scoring(DIM**-0.5)
ROUNDS, IN_A_ROW = 30, 24
BATCHES: dict[str, list[int]] = {
    "1 x 8192": [8192],
    "8 x 4096": [4096] * 8,
    "32 x 4096": [4096] * 32,
    "64 x 2048": [2048] * 64,
    "32 ragged, 1 to 8192": [int(n) for n in np.random.default_rng(0).integers(1, 8193, 32)],
}
CHUNKS = {"1 x 4096": (1, 4096), "8 x 1024": (8, 1024)}
Step = Callable[[], object]


def median_s(step: Step, rounds: int = ROUNDS) -> float:
    """Seconds of `step`, evaluated and waited for."""
    taken = []
    for number in range(rounds + 5):
        mx.synchronize()
        began = time.perf_counter()
        mx.eval(step())
        mx.synchronize()
        if number >= 5:
            taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def random(*shape: int) -> mx.array:
    """Evaluated, of DTYPE."""
    array = mx.random.normal(shape).astype(DTYPE)
    mx.eval(array)
    return array


class Paged:
    """A scrambled pool with sequences of the given lengths."""

    def __init__(self, contexts: list[int], whole: bool = False) -> None:
        """`whole`: all tokens are queries; else the last one of each sequence."""
        needed = [-(-context // BLOCK) for context in contexts]
        self.tables = np.split(np.random.permutation(sum(needed)).astype(np.int32), np.cumsum(needed)[:-1])
        self.shape = AttentionShape(HEADS, KV_HEADS, DIM, sum(needed), BLOCK, DTYPE)
        rows = sum(needed) * KV_HEADS * BLOCK
        self.pool = random(rows, DIM), random(rows, DIM)
        counts = [context if whole else 1 for context in contexts]
        first = np.cumsum([0, *counts]).tolist()
        self.spans = [Span(*facts) for facts in zip(first[:-1], counts, contexts, strict=True)]
        self.queries = random(sum(counts), HEADS, DIM)
        self.bytes = 2 * sum(contexts) * KV_HEADS * DIM * DTYPE.size


def decode_steps(paged: Paged, launcher: Launcher, gpu: Gpu) -> tuple[Step, Step]:
    """One call, and IN_A_ROW calls, each behind the one before."""
    plan = plan_decode(paged.spans, paged.tables, paged.shape, None, gpu)

    def run(count: int) -> list[mx.array]:
        outputs, token = [], mx.zeros((1,), mx.int32)
        for _ in range(count):
            out, token = decode(launcher, plan, paged.queries, paged.pool, SCORING, token)
            outputs.append(out)
        return outputs

    return lambda: run(1), lambda: run(IN_A_ROW)


def mlx_decode(count: int, context: int) -> tuple[Step, Step]:
    """MLX's attention of one query over contiguous K and V: one call, and IN_A_ROW, each of the last's result."""
    keys, values = random(count, KV_HEADS, context, DIM), random(count, KV_HEADS, context, DIM)
    queries = random(count, HEADS, 1, DIM)

    def run(calls: int) -> mx.array:
        out = queries
        for _ in range(calls):
            out = mx.fast.scaled_dot_product_attention(out, keys, values, scale=SCORING.scale)
        return out

    return lambda: run(1), lambda: run(IN_A_ROW)


def torch_s(count: int, queries: int, context: int) -> tuple[float, float] | None:
    """PyTorch's attention of the same shape: seconds of one call, and of one's share of IN_A_ROW; None without it."""
    try:
        import torch
    except ImportError:
        return None
    kv = [torch.randn(count, KV_HEADS, context, DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    q = torch.randn(count, HEADS, queries, DIM, device="cuda", dtype=torch.bfloat16)

    def seconds(calls: int, rounds: int) -> float:
        taken = []
        for number in range(rounds + 5):
            torch.cuda.synchronize()
            began, out = time.perf_counter(), q
            for _ in range(calls):
                out = torch.nn.functional.scaled_dot_product_attention(out, *kv, enable_gqa=True, is_causal=queries > 1)
            torch.cuda.synchronize()
            if number >= 5:
                taken.append(time.perf_counter() - began)
        return statistics.median(taken) / calls

    with torch.inference_mode():
        return seconds(1, ROUNDS), seconds(IN_A_ROW, 8)


def one_and_share(steps: tuple[Step, Step]) -> tuple[float, float]:
    """Seconds of one call, and of one's share of IN_A_ROW."""
    one, row = steps
    return median_s(one), median_s(row, 8) / IN_A_ROW


def rate(paged: Paged, seconds: float | None) -> str:
    """GB/s of K and V."""
    return "-" if seconds is None else f"{paged.bytes / seconds / 1e9:.0f}"


def measure_decode(launcher: Launcher, gpu: Gpu, with_torch: bool) -> None:
    """Print the table of decode attention."""
    big = random(1 << 28)
    print(f"device copy: {2 * big.nbytes / median_s(lambda: big + 1) / 1e9:.0f} GB/s read and written\n")
    print("| decode, GB/s of K and V | one call: ours | MLX | PyTorch | in a row: ours | MLX | PyTorch |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, contexts in BATCHES.items():
        paged = Paged(contexts)
        ours, ours_row = one_and_share(decode_steps(paged, launcher, gpu))
        theirs, theirs_row = one_and_share(mlx_decode(len(contexts), max(contexts)))
        torches, torches_row = (torch_s(len(contexts), 1, max(contexts)) if with_torch else None) or (None, None)
        taken = (ours, theirs, torches, ours_row, theirs_row, torches_row)
        rates = (rate(paged, seconds) for seconds in taken)
        print(f"| {name} | {' | '.join(rates)} |", flush=True)


def prefill_steps(attend: Callable[[mx.array], mx.array], queries: mx.array) -> tuple[Step, Step]:
    """One call, and IN_A_ROW calls, each of the last's result."""

    def run(calls: int) -> mx.array:
        out = queries
        for _ in range(calls):
            out = attend(out)
        return out

    return lambda: run(1), lambda: run(IN_A_ROW)


def prefill_ways(count: int, length: int, launcher: Launcher, gpu: Gpu) -> list[tuple[Step, Step]]:
    """The kernel, what the worker takes on CUDA, and MLX's attention of contiguous arrays.

    Raises:
        RuntimeError: the first two differ by more than rounding.
    """
    paged = Paged([length] * count, whole=True)
    tiles = plan_prefill(paged.spans, paged.tables, paged.shape, None, gpu)
    whole = plan_contiguous(paged.spans, paged.tables, KV_HEADS, BLOCK, None)
    token = mx.zeros((1,), mx.int32)
    blocks = np.concatenate(paged.tables)[:, None] * KV_HEADS + np.arange(KV_HEADS)
    keys, values = (
        buffer.reshape(-1, BLOCK, DIM)[mx.array(blocks)].swapaxes(1, 2).reshape(-1, KV_HEADS, DIM)
        for buffer in paged.pool
    )
    q, k, v = (random(count, heads, length, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))

    def kernel(queries: mx.array) -> mx.array:
        return prefill(launcher, tiles, queries, paged.pool, SCORING, token)[0]

    def contiguous(queries: mx.array) -> mx.array:
        return contiguous_prefill(whole, (queries, keys, values), paged.pool, SCORING, token)[0]

    def theirs(queries: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=SCORING.scale, mask="causal")

    mx.eval(keys, values)
    error = mx.abs(kernel(paged.queries).astype(mx.float32) - contiguous(paged.queries)).max().item()
    if not error < 6e-2:
        raise RuntimeError(f"the kernel and MLX's attention of {count} x {length} differ by {error:.1e}")
    return [
        prefill_steps(way, start) for way, start in ((kernel, paged.queries), (contiguous, paged.queries), (theirs, q))
    ]


def measure_prefill(launcher: Launcher, gpu: Gpu, with_torch: bool) -> None:
    """Print the table of prompt attention."""
    print("\n| prefill, ms | one call: kernel | worker on CUDA | MLX | PyTorch | in a row: worker | MLX | PyTorch |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, (count, length) in CHUNKS.items():
        (kernel, _), worker, theirs = prefill_ways(count, length, launcher, gpu)
        ours, mlx = one_and_share(worker), one_and_share(theirs)
        torches = (torch_s(count, length, length) if with_torch else None) or (None, None)
        taken = (median_s(kernel, 5), ours[0], mlx[0], torches[0], ours[1], mlx[1], torches[1])
        cells = ["-" if seconds is None else f"{seconds * 1e3:.2f}" for seconds in taken]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def sweep(launcher: Launcher, gpu: Gpu) -> None:
    """Print decode's rates for other choices."""
    table = cast(dict[Family, DecodeTuning], DECODE)
    chosen = table[gpu.family]
    print("| loads | simdgroups | threadgroups | keys | " + " | ".join(BATCHES) + " |")
    print("|---:|---:|---:|---:|" + "---:|" * len(BATCHES))
    batches = [Paged(contexts) for contexts in BATCHES.values()]
    for loads in (1, 2, 4):
        for simdgroups in (2, 4, 8):
            for threadgroups, keys in ((2, 512), (4, 256), (4, 1024), (8, 512)):
                table[gpu.family] = replace(
                    chosen, loads=loads, simdgroups=simdgroups, threadgroups=threadgroups, keys=(64, keys)
                )
                rates = [rate(p, median_s(decode_steps(p, launcher, gpu)[1], 3) / IN_A_ROW) for p in batches]
                print(f"| {loads} | {simdgroups} | {threadgroups} | {keys} | {' | '.join(rates)} |", flush=True)
    table[gpu.family] = chosen


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="try other choices for decode")
    parser.add_argument("--torch", action="store_true", help="measure PyTorch, too")
    options = parser.parse_args()
    launcher: Launcher = MetalLauncher() if mx.metal.is_available() else CudaLauncher()
    gpu = this_gpu()
    print(f"{mx.device_info(mx.default_device())['device_name']}, MLX {mx.__version__}, {gpu}\n")
    if options.sweep:
        sweep(launcher, gpu)
        return
    measure_decode(launcher, gpu, options.torch)
    measure_prefill(launcher, gpu, options.torch)


if __name__ == "__main__":
    main()
