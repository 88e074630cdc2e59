"""Runs a compiled kernel: buffers into guarded memory, one launch in a chosen order of threads, results out.

    shared object --Kernel.run(buffers, sizes, order)--> buffers changed, or KernelError

One launch runs in one thread of the operating system, threadgroup after threadgroup (msl/launch.h).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from emulator.build import shared_object
from emulator.memory import Guarded, Mapping
from emulator.translate import MetalText, translate

MOST_THREADS = 1024
STACK_BYTES = 256 * 1024
SHARED_BYTES = 32 * 1024
"""Of threadgroup memory, on every Mac GPU so far."""
MOST_BUFFERS = 31
"""Of a kernel, in Metal."""
CELL_BYTES = 2
"""Elements smaller than this are not looked at for races (msl/access.h)."""

_MESSAGE_BYTES = 512
_BYTES_OF_CELL = 24
MOST_SECONDS = 100
"""Of processor time for one launch: what takes longer never ends."""


class Order(IntEnum):
    """Of threads that may run, and of threadgroups. UP and DOWN let one simdgroup run as far as it gets."""

    UP = 0
    DOWN = 1
    SHUFFLED = 2


class KernelError(RuntimeError):
    """A kernel did what it must not."""


@dataclass(frozen=True)
class Buffer:
    """An argument of a kernel.

    Attributes:
        content: uint8, row-major bytes; changed by a run if `writable`. itemsize: bytes of an element.
    """

    name: str
    content: np.ndarray
    itemsize: int
    writable: bool = False


class _Size(ctypes.Structure):
    _fields_ = (("x", ctypes.c_uint), ("y", ctypes.c_uint), ("z", ctypes.c_uint))


class _Argument(ctypes.Structure):
    """emu::Buffer."""

    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
        ("mapped_begin", ctypes.c_void_p),
        ("mapped_end", ctypes.c_void_p),
        ("cells", ctypes.c_void_p),
    )


class _Launch(ctypes.Structure):
    """EmuLaunch."""

    _fields_ = (
        ("grid", _Size),
        ("threadgroup", _Size),
        ("order", ctypes.c_int),
        ("lockstep", ctypes.c_int),
        ("num_buffers", ctypes.c_uint),
        ("seed", ctypes.c_uint64),
        ("most_seconds", ctypes.c_uint),
        ("stacks", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
        ("stack_bytes", ctypes.c_uint64),
        ("pointers", ctypes.POINTER(ctypes.c_void_p)),
        ("buffers", ctypes.POINTER(_Argument)),
        ("fault", ctypes.c_void_p),
        ("message", ctypes.c_char * _MESSAGE_BYTES),
    )


class Machine:
    """The stacks of a threadgroup's threads, and its own memory. One launch at a time."""

    def __init__(self) -> None:
        self.stacks = Mapping(MOST_THREADS * STACK_BYTES)
        self.shared = Mapping(SHARED_BYTES)


class Kernel:
    """A compiled kernel function."""

    def __init__(self, path: Path) -> None:
        self._run = ctypes.CDLL(str(path)).emu_run
        self._run.argtypes = [ctypes.POINTER(_Launch)]
        self._run.restype = None

    def run(
        self,
        machine: Machine,
        buffers: Sequence[Buffer],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        order: Order = Order.UP,
        seed: int = 0,
        lockstep: bool = False,
        most_seconds: int = MOST_SECONDS,
    ) -> None:
        """Launch once; `content` of the writable buffers is what they hold afterwards.

        Args:
            seed: of the shuffled order. lockstep: simd operations order the memory of a simdgroup, which Metal does not
                promise. most_seconds: of processor time.

        Raises:
            KernelError: out of bounds, a race, a barrier that not all reach, ...; nothing is written back.
        """
        guarded = [Guarded(b.name, b.content.nbytes, b.content, b.writable) for b in buffers]
        launch, kept = _prepare(machine, buffers, guarded, grid, threadgroup)
        launch.order, launch.seed = order, seed
        launch.lockstep, launch.most_seconds = lockstep, most_seconds
        try:
            self._run(ctypes.byref(launch))
            message = launch.message.decode()
            if message:
                raise KernelError(_explain(message, launch.fault, guarded))
            for buffer, copy in zip(buffers, guarded, strict=True):
                if buffer.writable:
                    buffer.content[:] = copy.content
        finally:
            for copy in guarded:
                copy.mapping.close()
            for cells in kept:
                cells.close()


def compiled(metal: MetalText) -> Kernel:
    """Translate, compile if needed, load."""
    return Kernel(shared_object(translate(metal)))


def _prepare(
    machine: Machine,
    buffers: Sequence[Buffer],
    guarded: Sequence[Guarded],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
) -> tuple[_Launch, list[Mapping]]:
    """What the runtime takes, and the memory for its notes about accesses."""
    if len(buffers) > MOST_BUFFERS:
        raise ValueError(f"{len(buffers)} buffers are over {MOST_BUFFERS}")
    cells, arguments = [], []
    for buffer, copy in zip(buffers, guarded, strict=True):
        notes = 0
        if buffer.writable and buffer.itemsize >= CELL_BYTES:
            cells.append(Mapping(_BYTES_OF_CELL * (copy.size // CELL_BYTES + 1)))
            notes = cells[-1].address
        ends = copy.address, copy.address + copy.size
        pages = copy.mapping.address, copy.mapping.address + copy.mapping.size
        arguments.append(_Argument(*ends, *pages, notes))
    launch = _Launch(
        grid=_Size(*grid),
        threadgroup=_Size(*threadgroup),
        num_buffers=len(arguments),
        stacks=machine.stacks.address,
        shared=machine.shared.address,
        stack_bytes=STACK_BYTES,
        pointers=(ctypes.c_void_p * len(guarded))(*(copy.address for copy in guarded)),
        buffers=(_Argument * len(arguments))(*arguments),
    )
    return launch, cells


def _explain(message: str, address: int | None, guarded: Sequence[Guarded]) -> str:
    """The runtime's message with names for addresses and for "buffer N"."""
    if address is not None:
        near = [found for copy in guarded if (found := copy.describe(address)) is not None]
        return f"{message}: {near[0] if near else 'neither an argument nor a variable of its own'}"
    for index, copy in reversed(list(enumerate(guarded))):
        message = message.replace(f"buffer {index}", copy.name)
    return message
