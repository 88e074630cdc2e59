"""Memory that ends where it should: a buffer stands against an unmapped page, and inputs cannot be written.

    bytes --Guarded--> pages: [unmapped][fill | the bytes | fill][unmapped]

The end is exact to the alignment that kernels rely on; msl/access.h looks at the rest for buffers that are written.
"""

import ctypes
import mmap

import numpy as np

_PROT_NONE, _PROT_READ, _PROT_WRITE = 0, 1, 2
_ALIGNMENT = 16
"""Of a buffer's start, in bytes: kernels load so many at once."""

GUARD_BYTES = 1 << 30
"""Before and behind a mapping: addresses only, which cost nothing."""

FILL = 0xFF
"""Of each byte that nobody has written: a not-a-number in each float format."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Mapping:
    """Pages of their own between two stretches of addresses that are not mapped.

    Attributes:
        address, size: of the pages, in bytes.
    """

    def __init__(self, size: int) -> None:
        """Map at least `size` bytes, all zero. Raises OSError if there is no room."""
        self.size = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._base = _libc.mmap(None, self.size + 2 * GUARD_BYTES, _PROT_NONE, flags, -1, 0)
        if self._base in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), f"cannot map {self.size} bytes")
        self.address = self._base + GUARD_BYTES
        self._protect(_PROT_READ | _PROT_WRITE)

    def make_read_only(self) -> None:
        """From now on a write faults."""
        self._protect(_PROT_READ)

    def close(self) -> None:
        """Unmap."""
        _libc.munmap(self._base, self.size + 2 * GUARD_BYTES)

    def _protect(self, protection: int) -> None:
        if _libc.mprotect(self.address, self.size, protection):
            raise OSError(ctypes.get_errno(), "mprotect failed")


class Guarded:
    """A copy of some bytes whose end, up to the alignment of 16, is the end of its mapping.

    Attributes:
        name: for messages. address, size: of the bytes. mapping: around them.
    """

    def __init__(self, name: str, size: int, content: np.ndarray | None, writable: bool) -> None:
        """Hold `content` (uint8), or `size` bytes of `FILL`; read-only unless `writable`."""
        self.name, self.size, self.writable = name, size, writable
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        self.mapping = Mapping(room)
        self._lead = self.mapping.size - room
        self.address = self.mapping.address + self._lead
        self._pages = np.ctypeslib.as_array((ctypes.c_uint8 * self.mapping.size).from_address(self.mapping.address))
        self._pages[:] = FILL
        self.content = self._pages[self._lead : self._lead + size]
        if content is not None:
            self.content[:] = content
        if not writable:
            self.mapping.make_read_only()

    def describe(self, address: int) -> str | None:
        """Where `address` is as seen from here; None if it is nowhere near."""
        begin = self.mapping.address - GUARD_BYTES
        end = self.mapping.address + self.mapping.size + GUARD_BYTES
        if not begin <= address < end:
            return None
        offset = address - self.address
        if offset < 0:
            return f"{-offset} bytes before the start of {self.name}"
        if offset >= self.size:
            return f"{offset - self.size} bytes behind the end of {self.name}"
        return f"byte {offset} of {self.name}" + ("" if self.writable else ", which is read-only")
