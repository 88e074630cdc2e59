"""Where the calls of a loaded library lead: read and changed in the dynamic linker's own table. Linux only.

    library --dynamic section, relocations--> slot of a function it imports --bind--> another function's address

A library calls what it imports through its global offset table. To bind a slot there changes that library's calls and
nobody else's, at any time after it was loaded, without an environment variable and without root.

Source: System V ABI, chapter 5 "Dynamic Linking" (dynamic section, relocations); glibc <link.h> (`struct link_map`).
"""

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_RELA, _DT_RELASZ, _DT_JMPREL = 2, 5, 6, 7, 8, 23
_SLOT_TYPES = frozenset({6, 7, 1025, 1026})  # R_X86_64_{GLOB_DAT,JUMP_SLOT}, R_AARCH64_{GLOB_DAT,JUMP_SLOT}


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


def bind(library: ctypes.CDLL, function: str, address: int) -> bool:
    """Let `library`'s calls of `function` lead to `address`; False if it does not import that function.

    Raises:
        OSError: if the table cannot be made writable.
    """
    found = False
    for slot in _slots(library, function):
        _write(slot, address)
        found = True
    return found


def target(library: ctypes.CDLL, function: str) -> int | None:
    """Where `library`'s calls of `function` lead; None if it does not import it."""
    return next((ctypes.c_uint64.from_address(slot).value for slot in _slots(library, function)), None)


def file_of(address: int) -> Path | None:
    """The file that the code at `address` was loaded from; None if it comes from none."""
    file, _ = _mapping_of(address)
    return Path(file) if file else None


def _slots(library: ctypes.CDLL, function: str) -> Iterator[int]:
    """Addresses of the slots through which `library` calls `function`."""
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
                if name == function:
                    yield link.base + rela.offset


def _write(slot: int, address: int) -> None:
    """Stores `address` at `slot`, whose page may have been made read-only after relocation."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = ctypes.c_void_p(slot & -mmap.PAGESIZE)
    length = ctypes.c_size_t(mmap.PAGESIZE)
    _, was_writable = _mapping_of(slot)
    if libc.mprotect(page, length, mmap.PROT_READ | mmap.PROT_WRITE) != 0:
        raise OSError(ctypes.get_errno(), "mprotect of a global offset table")
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
