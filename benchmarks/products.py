"""Measures products of few rows, C = A B': our code beside OpenBLAS, one thread each, interleaved, best of some rounds.

    python benchmarks/products.py                    # the shapes of SmolLM2's layers, 1 to 32 rows

Each round runs through copies of B that together exceed the caches, as a decode step runs through a model's layers.
"""

import argparse
import ctypes
import os
import time
from collections.abc import Callable

import numpy as np

from pomarium.kernels import narrow_gemm
from pomarium.worker import blas

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576))
ROWS = (1, 2, 4, 8, 16, 32)
TOTAL_BYTES = 300 << 20
_C = ctypes
SIGNATURE = ctypes.CFUNCTYPE(
    None, *[_C.c_int] * 6, _C.c_float, _C.c_void_p, _C.c_int, _C.c_void_p, _C.c_int, _C.c_float, _C.c_void_p, _C.c_int
)

Product = Callable[..., None]


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    lanes = narrow_gemm.lanes()
    if lanes is None:
        raise SystemExit("this processor has no fused multiply-add")
    library = ctypes.CDLL(str(blas.library_path()))
    library[blas.PREFIX + "openblas_set_num_threads"](ctypes.c_int(1))
    address = ctypes.cast(library[blas.PREFIX + "cblas_sgemm"], ctypes.c_void_p).value
    assert address is not None
    compiled = narrow_gemm.compile_product(address, lanes)
    openblas, ours = SIGNATURE(address), SIGNATURE(compiled.address)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; vectors of {lanes} floats\n")
    print("| B | rows of A | OpenBLAS, ms | ours, ms | ratio | ours, GB/s of B | ours, GFLOP/s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for n, k in SHAPES:
        weights = [np.random.default_rng(i).random((n, k), np.float32) for i in range(-(-TOTAL_BYTES // (4 * n * k)))]
        for rows in ROWS:
            theirs_s, ours_s = compare((openblas, ours), rows, weights, options.rounds)
            rate, flops = 4e-9 * n * k / ours_s, 2e-9 * rows * n * k / ours_s
            cells = f"{1e3 * theirs_s:.3f} | {1e3 * ours_s:.3f} | {theirs_s / ours_s:.2f}x | {rate:.1f} | {flops:.1f}"
            print(f"| {n} x {k} | {rows} | {cells} |", flush=True)


def compare(products: tuple[Product, Product], rows: int, weights: list[np.ndarray], rounds: int) -> list[float]:
    """Best seconds per product of each."""
    n, k = weights[0].shape
    a, c = np.random.default_rng(0).random((rows, k), np.float32), np.empty((rows, n), np.float32)
    best = [float("inf")] * len(products)
    for _ in range(rounds):
        for index, product in enumerate(products):
            start = time.perf_counter()
            for b in weights:
                product(101, 111, 112, rows, n, k, 1.0, a.ctypes.data, k, b.ctypes.data, k, 0.0, c.ctypes.data, n)
            best[index] = min(best[index], (time.perf_counter() - start) / len(weights))
    return best


if __name__ == "__main__":
    main()
