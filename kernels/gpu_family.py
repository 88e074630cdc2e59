"""Which family of GPU kernels are tuned for, and how many threadgroups keep it busy. Speed, never results."""

from dataclasses import dataclass
from enum import StrEnum

import mlx.core as mx


class Family(StrEnum):
    """GPU families with choices of their own."""

    APPLE = "apple"
    CUDA = "cuda"


@dataclass(frozen=True)
class Gpu:
    """A GPU as kernels see it.

    Attributes:
        cores: GPU cores (Apple) or streaming multiprocessors (CUDA), as far as known.
    """

    family: Family
    cores: int


H100 = Gpu(Family.CUDA, 132)

_APPLE_CORES = {"p": 6, "g": 10, "s": 32, "c": 40, "d": 76}
"""By the last letter of an architecture's name (applegpu_g16s): phone, base, Max (Pro too), Max, Ultra. Typical, for
MLX does not tell the number."""


def this_gpu() -> Gpu:
    """Of this machine; an H100 where there is no Apple GPU."""
    if not mx.metal.is_available():
        return H100
    architecture = str(mx.device_info(mx.Device(mx.gpu, 0))["architecture"])
    return Gpu(Family.APPLE, _APPLE_CORES.get(architecture[-1:], 10))
