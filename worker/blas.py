"""Gives MLX's CPU backend a real BLAS on Linux, without root, a compiler or an environment variable.

MLX's Linux CPU wheel links a reference BLAS (3-5 GF/s on two cores). The wheel `scipy-openblas32` carries OpenBLAS with
kernels for every x86-64 and arm64 core, but under prefixed names (`scipy_cblas_sgemm`), so neither LD_PRELOAD nor
RTLD_GLOBAL lets it take the place of the other. Instead the three matrix products that libmlx imports are bound to it
in libmlx's own table (`linkage`), the product of few rows to code of ours in between:

    libmlx --cblas_sgemm--> kernels.narrow_gemm --what is not narrow--> scipy_cblas_sgemm
           --cblas_dgemm, cblas_cgemm-----------------------------> scipy_cblas_dgemm, scipy_cblas_cgemm

That works before or after MLX and torch were imported and however the engine was started, and it leaves the BLAS of
torch, numpy and OpenCV alone. On macOS MLX calls Accelerate and nothing is done.
"""

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from pomarium.kernels import narrow_gemm
from pomarium.worker import linkage
from pomarium.worker.errors import PomariumError, SettingsError

DISTRIBUTION = "scipy-openblas32"
LIBRARY = "libscipy_openblas.so"
PREFIX = "scipy_"
PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""Every BLAS function that libmlx imports. Its LAPACK calls serve mlx.linalg, which no model here uses."""
THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"


@dataclass(frozen=True)
class BlasFacts:
    """Which BLAS computes MLX's dense products on the CPU.

    Attributes:
        name: the library with its version and the kernels it chose, for example "OpenBLAS 0.3.34 ... Haswell".
        path: its file; None if it is part of the system.
        threads: threads per product; None if the system decides.
        bound: the functions of libmlx that now lead to it; none if this libmlx imports no BLAS.
        narrow_lanes: floats in a vector of our own product of few rows; None if OpenBLAS computes that, too.
    """

    name: str
    path: Path | None
    threads: int | None
    bound: tuple[str, ...]
    narrow_lanes: int | None


def library_path() -> Path:
    """File of the installed OpenBLAS. Raises PomariumError if its wheel is not installed."""
    try:
        files = importlib.metadata.files(DISTRIBUTION) or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.name == LIBRARY:
            return Path(str(file.locate()))
    raise PomariumError(
        f"The package {DISTRIBUTION}, which gives MLX a fast BLAS on Linux, is not installed: run `make install`."
    )


def thread_count(environ: Mapping[str, str], physical_cores: int | None, usable_cpus: int) -> int:
    """Threads for one product: the user's OPENBLAS_NUM_THREADS, else all but one of the physical cores.

    The last core is the engine's and the endpoint's. OpenBLAS splits a product evenly and its threads wait for each
    other, so that one of them without a core holds up all: on two cores, one of them busy, a decode step of SmolLM2
    took 134 ms with one thread and 810 ms with two.
    OMP_NUM_THREADS is not read: Ray sets it to the CPUs that an actor reserved, which for a worker is 1.
    Raises SettingsError if the user's value is not a positive whole number.
    """
    text = environ.get(THREADS_VARIABLE)
    if text is None:
        return max(1, min(physical_cores or usable_cpus, usable_cpus) - 1)
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and int(digits) > 0):
        raise SettingsError(f"{THREADS_VARIABLE}={text!r} is not accepted: set it to a whole number above 0.")
    return int(digits)


def load(environ: Mapping[str, str] = os.environ, narrow: bool = True) -> BlasFacts:
    """Binds libmlx's matrix products to OpenBLAS on Linux; does nothing on macOS. Calling it again changes nothing.

    Imports mlx. Call it once per worker process before the first product (an earlier one only ran slower).

    Args:
        narrow: compute products of few rows with `kernels.narrow_gemm`, where the processor can and one thread
            computes a product (that code has no threads).

    Raises:
        PomariumError: the OpenBLAS wheel is missing.
        SettingsError: OPENBLAS_NUM_THREADS is not a positive whole number.
    """
    if sys.platform == "darwin":
        return BlasFacts("Accelerate", None, None, (), None)
    threads = thread_count(environ, psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))
    path = library_path()
    openblas = ctypes.CDLL(str(path))
    openblas[PREFIX + "openblas_set_num_threads"](ctypes.c_int(threads))
    addresses = {name: _address(openblas, PREFIX + name) for name in PRODUCTS}
    lanes = narrow_gemm.lanes() if narrow and threads == 1 else None
    if lanes is not None:
        addresses["cblas_sgemm"] = _narrow(addresses["cblas_sgemm"], lanes).address
    libmlx = _libmlx()
    bound = tuple(name for name, address in addresses.items() if linkage.bind(libmlx, name, address))
    return BlasFacts(_config(openblas), path, threads, bound, lanes if "cblas_sgemm" in bound else None)


def provider(function: str = "cblas_sgemm") -> Path | None:
    """The library that MLX's calls of `function` lead to; None if they lead to code of ours, or there are none. Linux
    only."""
    address = linkage.target(_libmlx(), function)
    return None if address is None else linkage.file_of(address)


@cache
def _narrow(fallback: int, lanes: int) -> narrow_gemm.Product:
    """Compiled once and kept: libmlx calls it for as long as the process lives."""
    return narrow_gemm.compile_product(fallback, lanes)


def _config(openblas: ctypes.CDLL) -> str:
    describe = openblas[PREFIX + "openblas_get_config"]
    describe.restype = ctypes.c_char_p
    return str(describe().decode())


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(library[name], ctypes.c_void_p).value
    assert address is not None, f"{name} has no address"
    return address


def _libmlx() -> ctypes.CDLL:
    """The libmlx.so that this process has mapped, importing mlx if need be; never a second copy of it."""
    import mlx.core as mx

    path = Path(str(mx.__file__)).parent / "lib" / "libmlx.so"
    return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
