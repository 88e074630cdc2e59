"""MLA decode on this machine's GPU: each way of the kernel against the MLX operations that define it, in one run.

    python benchmarks/mla_decode.py [--heads 20 128] [--repeats 30]

Needs mlx, numpy and the kernels only. Medians of a call's share of several evaluated together; the latents' bytes over
the time, beside a device copy (bytes read and written). Tunings that are not the GPU family's own are there to choose
by. Exits with 1 if a result is wrong.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from pomarium.kernels import mla
from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
from pomarium.kernels.reference_mla import latent_attention

BLOCK_SIZE, SCALE, BOUND = 16, 0.06, 6e-2
IN_A_ROW = 8
"""Calls evaluated together, as the layers of a model are."""

RAGGED = tuple(int(length) for length in np.geomspace(1, 8192, 32))
SHAPES: dict[str, tuple[int, ...]] = {
    "1 x 8192": (8192,),
    "8 x 4096": (4096,) * 8,
    "32 x 4096": (4096,) * 32,
    "64 x 2048": (2048,) * 64,
    "32, 1 to 8192": RAGGED,
}
TUNINGS: dict[str, mla.Tuning] = {
    "lanes 2": mla.Tuning(False, 2, 8, 2, 64),
    "lanes 4": mla.Tuning(False, 4, 8, 2, 64),
    "lanes 4, longer tasks": mla.Tuning(False, 4, 8, 1, 128),
    "matrices 2": mla.Tuning(True, 2, 8, 2, 64),
    "matrices 3": mla.Tuning(True, 3, 8, 2, 64),
    "matrices 4": mla.Tuning(True, 4, 8, 1, 64),
    "matrices 4, longer tasks": mla.Tuning(True, 4, 8, 1, 128),
    "matrices 2, longer tasks": mla.Tuning(True, 2, 8, 2, 128),
}


def median_seconds(compute: Callable[[], mx.array], repeats: int) -> float:
    """Of one of IN_A_ROW calls that are evaluated together, after one round that compiles and warms up."""
    mx.eval(compute())
    times = []
    for _ in range(repeats):
        mx.synchronize()
        began = time.perf_counter()
        mx.eval([compute() for _ in range(IN_A_ROW)])
        mx.synchronize()
        times.append((time.perf_counter() - began) / IN_A_ROW)
    return statistics.median(times)


def measure(launcher: Launcher, lengths: Sequence[int], heads: int, repeats: int) -> tuple[list[str], bool]:
    """One row per way: its time, its GB/s, how often faster than MLX's operations; and whether all are right."""
    rng, width = np.random.default_rng(0), mla.RANK + mla.ROPE
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    num_blocks = sum(counts)
    blocks, tables = rng.permutation(num_blocks).tolist(), np.zeros((len(lengths), max(counts)), np.int32)
    for row, count in zip(tables, counts, strict=True):
        row[:count] = [blocks.pop() for _ in range(count)]
    queries = mx.random.normal((len(lengths), heads, width)).astype(mx.bfloat16)
    latents = mx.random.normal((num_blocks * BLOCK_SIZE, width)).astype(mx.bfloat16)
    seen, on_device = np.array(lengths, np.int32), (mx.array(tables), mx.array(lengths, mx.int32))
    mx.eval(queries, latents, on_device)

    def operations() -> mx.array:
        return latent_attention(queries, latents, *on_device, rank=mla.RANK, block_size=BLOCK_SIZE, scale=SCALE)

    want, base = operations().astype(mx.float32), median_seconds(operations, repeats)
    read = sum(lengths) * width * 2
    rows, right = [f"MLX operations | {base * 1e6:.0f} | {read / base / 1e9:.0f} | 1.00"], True
    for name, tuning in TUNINGS.items():
        sizes = {"heads": heads, "dtype": mx.bfloat16, "block_size": BLOCK_SIZE, "num_blocks": num_blocks}
        plan = mla.plan(tables, seen, **sizes, gpu=this_gpu(), tuning=tuning)

        def kernel(plan: mla.DecodePlan = plan) -> mx.array:
            return mla.decode(launcher, plan, queries, latents, SCALE, mx.zeros((1,), mx.int32))[0]

        error = mx.abs(kernel().astype(mx.float32) - want).max().item()
        seconds = median_seconds(kernel, repeats)
        own = " (own)" if tuning == mla.TUNINGS[this_gpu().family] else ""
        verdict = "" if error < BOUND else f" WRONG by {error:.1e}"
        rows.append(f"{name}{own} | {seconds * 1e6:.0f} | {read / seconds / 1e9:.0f} | {base / seconds:.2f}{verdict}")
        right = right and error < BOUND
    return rows, right


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, nargs="+", default=[20, 128])
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    launcher: Launcher = MetalLauncher() if mx.metal.is_available() else CudaLauncher()
    source = mx.zeros((1 << 28,), mx.bfloat16)
    copy = median_seconds(lambda: source + 1, options.repeats)
    print(f"device copy: {2 * source.nbytes / copy / 1e9:.0f} GB/s\n")
    print("heads | sequences x context | way | us | GB/s of latents | times MLX operations\n" + " | ".join(["---"] * 6))
    right = True
    for heads in options.heads:
        for name, lengths in SHAPES.items():
            rows, good = measure(launcher, lengths, heads, options.repeats)
            right = right and good
            for row in rows:
                print(f"{heads} | {name} | {row}", flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
