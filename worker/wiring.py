"""What stays wired on a Mac: nothing, or weights and KV pool, once and for good.

    live arrays, page size --plan--> WirePlan --wire--> mx.set_wired_limit, and seals that this process keeps

MLX wires whatever it allocates while that fits under its limit (mlx/backend/metal/resident.h, 0.32.4: `insert` at each
allocation, `erase` at each release, `resize` takes in what is there). A limit with room to spare would therefore wire
and unwire the temporary arrays of every step, which is what kernels panic of (ml-explore/mlx, issue 3186: 3 runs of 3
within two minutes, none of 10 without a limit). So the limit is set when only what stays is there, to as much as that
takes, and what rounding leaves of it is filled with arrays of nothing, the seals: no array of a step fits any more.

How Metal rounds a buffer's size is not documented. MLX itself rounds those above a page to pages; of smaller ones each
may take up to a page, and those of 256 bytes and less lie in a heap of 1 MiB. `plan` holds for any such rounding.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import PAGESIZE

import mlx.core as mx

from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.errors import InsufficientMemoryError
from pomarium.worker.settings import Wire

logger = logging.getLogger(__name__)

HEAP_BYTES = 1 << 20
"""MLX's heap of small buffers (mlx/backend/metal/allocator.h), one allocation."""
IN_HEAP = 256
"""Bytes of the largest of them."""
UNKNOWN_ARRAYS = 512
"""Small arrays that nobody listed, such as each layer's rotary frequencies: 8 MiB if each takes a page."""


@dataclass(frozen=True)
class WirePlan:
    """Bytes. limit: for MLX. seals: of each array that fills it up, in the order in which to make them."""

    limit: int
    seals: tuple[int, ...]


def plan(active: int, sizes: Sequence[int], page: int) -> WirePlan:
    """What to wire.

    Args:
        active: bytes of all live arrays as MLX counts them. sizes: of those that are known. page: of the machine.
    """
    small = sum(size < page for size in sizes) + UNKNOWN_ARRAYS
    slack = HEAP_BYTES + small * page
    halves = [page >> shift for shift in range(1, page.bit_length()) if page >> shift > IN_HEAP]
    return WirePlan(active + slack, (page,) * (slack // page + 1) + tuple(halves))


class Wired:
    """The seals, for as long as this is held."""

    def __init__(self, seals: Sequence[mx.array] = ()) -> None:
        self._seals = tuple(seals)


def wire(device: Device, choice: Wire, arrays: Sequence[mx.array]) -> Wired:
    """Does what POMARIUM_WIRE says, in one log line. To be called once, when weights and pool are there and idle.

    Args:
        arrays: weights and pool.

    Raises:
        InsufficientMemoryError: they are more than macOS lets a process wire.
    """
    if device.backend is not GpuBackend.METAL:
        if choice is Wire.POOL:
            logger.info("Wired memory: POMARIUM_WIRE=pool has no effect here, only Metal wires memory.")
        return Wired()
    if choice is Wire.OFF:
        logger.info(
            "Wired memory: none (POMARIUM_WIRE=off). If tokens/s fall to a fraction after a pause, macOS has taken the "
            "weights for idle: try POMARIUM_WIRE=pool."
        )
        return Wired()
    mx.synchronize()
    mx.clear_cache()
    wanted = plan(int(mx.get_active_memory()), [array.nbytes for array in arrays], PAGESIZE)
    most = int(mx.device_info(mx.Device(mx.gpu, 0))["max_recommended_working_set_size"])
    check(wanted, most)
    mx.set_wired_limit(wanted.limit)
    seals = [mx.zeros((size,), mx.uint8) for size in wanted.seals]
    mx.eval(seals)
    logger.info("Wired memory: weights and KV pool, %d MiB, set once (POMARIUM_WIRE=pool).", wanted.limit >> 20)
    return Wired(seals)


def check(wanted: WirePlan, most: int) -> None:
    """Raises InsufficientMemoryError if `wanted` is above the `most` bytes that macOS lets a process wire."""
    if wanted.limit > most:
        raise InsufficientMemoryError(
            f"POMARIUM_WIRE=pool would wire {wanted.limit >> 20} MiB and macOS allows {most >> 20} MiB: set it to off, "
            "lower VLLM_METAL_MEMORY_FRACTION or --kv-cache-memory-bytes, or raise `sudo sysctl iogpu.wired_limit_mb`."
        )
