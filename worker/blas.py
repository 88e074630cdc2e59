"""Gives MLX's CPU backend a real BLAS on Linux, without root, a compiler or an environment variable.

MLX's Linux CPU wheel links a reference BLAS (3-5 GF/s on two cores). The wheel `scipy-openblas32` carries OpenBLAS with
kernels for every x86-64 and arm64 core, but under prefixed names (`scipy_cblas_sgemm`), so neither LD_PRELOAD nor
RTLD_GLOBAL lets it take the place of the other. Instead the three matrix products that libmlx imports are bound to it
where the dynamic linker keeps their addresses, the global offset table of libmlx:

    scipy_cblas_sgemm --address--> slot of `cblas_sgemm` in libmlx's table      (nothing else in the process changes)

That works before or after MLX and torch were imported and however the engine was started, and it leaves the BLAS of
torch, numpy and OpenCV alone. On macOS MLX calls Accelerate and nothing is done.

Source: System V ABI, chapter 5 "Dynamic Linking" (dynamic section, relocations); glibc <link.h> (`struct link_map`).
"""

import ctypes
import importlib.metadata
import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pomarium.worker.errors import PomariumError, SettingsError

DISTRIBUTION = "scipy-openblas32"
LIBRARY = "libscipy_openblas.so"
PREFIX = "scipy_"
PRODUCTS = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
"""Every BLAS function that libmlx imports. Its LAPACK calls serve mlx.linalg, which no model here uses."""
THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"

_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_SLOT_TYPES = frozenset({6, 7, 1025, 1026})  # R_X86_64_{GLOB_DAT,JUMP_SLOT}, R_AARCH64_{GLOB_DAT,JUMP_SLOT}


@dataclass(frozen=True)
class BlasFacts:
    """Which BLAS computes MLX's dense products on the CPU.

    Attributes:
        name: the library with its version and the kernels it chose, for example "OpenBLAS 0.3.34 ... Haswell".
        path: its file; None if it is part of the system.
        threads: threads per product; None if the system decides.
        bound: the functions of libmlx that now lead to it; none if this libmlx imports no BLAS.
    """

    name: str
    path: Path | None
    threads: int | None
    bound: tuple[str, ...]


class _Dyn(ctypes.Structure):
    _fields_ = (("tag", ctypes.c_int64), ("value", ctypes.c_uint64))


class _Rela(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("info", ctypes.c_uint64), ("addend", ctypes.c_int64))


class _Sym(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_uint32),
        ("info", ctypes.c_ubyte),
        ("other", ctypes.c_ubyte),
        ("section", ctypes.c_uint16),
        ("value", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


class _LinkMap(ctypes.Structure):
    """The public head of glibc's `struct link_map`, which is what a dlopen handle points to."""

    _fields_ = (("base", ctypes.c_uint64), ("path", ctypes.c_char_p), ("dynamic", ctypes.c_uint64))


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


def load(environ: Mapping[str, str] = os.environ) -> BlasFacts:
    """Binds libmlx's matrix products to OpenBLAS on Linux; does nothing on macOS. Calling it again changes nothing.

    Imports mlx. Call it once per worker process before the first product (an earlier one only ran slower).

    Raises:
        PomariumError: the OpenBLAS wheel is missing.
        SettingsError: OPENBLAS_NUM_THREADS is not a positive whole number.
    """
    if sys.platform == "darwin":
        return BlasFacts("Accelerate", None, None, ())
    threads = thread_count(environ, psutil.cpu_count(logical=False), len(os.sched_getaffinity(0)))
    path = library_path()
    openblas = ctypes.CDLL(str(path))
    openblas[PREFIX + "openblas_set_num_threads"](ctypes.c_int(threads))
    bound = set()
    for name, slot in _slots(_libmlx()):
        _write(slot, _address(openblas, PREFIX + name))
        bound.add(name)
    return BlasFacts(_config(openblas), path, threads, tuple(sorted(bound)))


def provider(function: str = "cblas_sgemm") -> Path | None:
    """The library that MLX's calls of `function` lead to; None if libmlx does not import it. Linux only."""
    for name, slot in _slots(_libmlx()):
        if name == function:
            file, _ = _mapping_of(ctypes.c_uint64.from_address(slot).value)
            return Path(file)
    return None


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


def _slots(library: ctypes.CDLL) -> Iterator[tuple[str, int]]:
    """(function, address of its slot) for each of PRODUCTS that `library` imports."""
    link = _LinkMap.from_address(library._handle)
    table: dict[int, int] = {}
    entry = link.dynamic
    while (dyn := _Dyn.from_address(entry)).tag != 0:
        table[dyn.tag] = dyn.value
        entry += ctypes.sizeof(_Dyn)
    # glibc has turned the addresses of the dynamic section into absolute ones while loading.
    for start, size in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
        for offset in range(0, table.get(size, 0), ctypes.sizeof(_Rela)):
            rela = _Rela.from_address(table[start] + offset)
            if rela.info & 0xFFFFFFFF in _SLOT_TYPES:
                symbol = _Sym.from_address(table[_DT_SYMTAB] + (rela.info >> 32) * ctypes.sizeof(_Sym))
                name = ctypes.string_at(table[_DT_STRTAB] + symbol.name).decode()
                if name in PRODUCTS:
                    yield name, link.base + rela.offset


def _write(slot: int, address: int) -> None:
    """Stores `address` at `slot`, whose page may have been made read-only after relocation."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.c_void_p(slot & -mmap.PAGESIZE)
    length = ctypes.c_size_t(mmap.PAGESIZE)
    _, was_writable = _mapping_of(slot)
    if libc.mprotect(page, length, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of libmlx's global offset table")
    ctypes.c_uint64.from_address(slot).value = address
    if not was_writable:
        libc.mprotect(page, length, mmap.PROT_READ)


def _mapping_of(address: int) -> tuple[str, bool]:
    """(file, writable) of the mapping that holds `address` (proc(5), /proc/pid/maps)."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, _, _, _, *file = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in span.split("-"))
        if first <= address < last:
            return (file[0] if file else ""), "w" in permissions
    raise ValueError(f"address {address:#x} is not mapped")
