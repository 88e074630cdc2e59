"""Apple's chips: name and GPU cores -> memory bandwidth and floating-point speed. A pure table.

Bandwidths are those that Apple publishes (technical specifications and press releases of the Macs, M1 to M5).
Floating-point speeds are ESTIMATES: GPU cores x 128 multiply-adds a cycle x 2 x clock, with clocks that others measured
(1.28 GHz for M1, 1.40 for M2; for M3 to M5 sources differ, and the lower figures are taken). 16-bit arithmetic runs at
least at the 32-bit rate, and one rate is given for both; the matrix units in M5's GPU cores are not counted. Measured
values belong into rack.yaml, where they take precedence.
"""

import re
from dataclasses import dataclass

from pomarium.worker.errors import SettingsError

_FMA_PER_CORE = 128
_CLOCK_HZ = {1: 1.28e9, 2: 1.40e9, 3: 1.38e9, 4: 1.47e9, 5: 1.47e9}


@dataclass(frozen=True)
class Chip:
    """Attributes: name: "M2 Ultra". bandwidth: bytes/s, published. flops: FLOP/s, estimated, 32 and 16 bit alike."""

    name: str
    gpu_cores: int
    bandwidth: float
    flops: float


_PUBLISHED: dict[str, dict[int, float]] = {
    # name: {GPU cores: GB/s}
    "M1": {7: 68, 8: 68},
    "M1 Pro": {14: 200, 16: 200},
    "M1 Max": {24: 400, 32: 400},
    "M1 Ultra": {48: 800, 64: 800},
    "M2": {8: 100, 10: 100},
    "M2 Pro": {16: 200, 19: 200},
    "M2 Max": {30: 400, 38: 400},
    "M2 Ultra": {60: 800, 76: 800},
    "M3": {8: 100, 10: 100},
    "M3 Pro": {14: 150, 18: 150},
    "M3 Max": {30: 300, 40: 400},
    "M3 Ultra": {60: 819, 80: 819},
    "M4": {8: 120, 10: 120},
    "M4 Pro": {16: 273, 20: 273},
    "M4 Max": {32: 410, 40: 546},
    "M5": {8: 153, 10: 153},
    "M5 Pro": {16: 307, 20: 307},
    "M5 Max": {32: 460, 40: 614},
}

CHIPS: dict[tuple[str, int], Chip] = {
    (name, cores): Chip(name, cores, rate * 1e9, cores * _FMA_PER_CORE * 2 * _CLOCK_HZ[int(name[1])])
    for name, variants in _PUBLISHED.items()
    for cores, rate in variants.items()
}
"""(name, GPU cores) -> Chip."""

_BRAND = re.compile(r"(?:apple\s+)?(m\d+)(?:\s+(pro|max|ultra))?", re.IGNORECASE)


def is_apple(brand: str) -> bool:
    """Whether `brand` names a chip of Apple's, in the table or newer."""
    return _BRAND.fullmatch(" ".join(brand.split())) is not None


def is_known(brand: str, gpu_cores: int | None = None) -> bool:
    """Whether `identify` finds it."""
    try:
        identify(brand, gpu_cores)
    except SettingsError:
        return False
    return True


def identify(brand: str, gpu_cores: int | None = None) -> Chip:
    """The chip that `sysctl -n machdep.cpu.brand_string` or a person calls `brand`.

    Args:
        gpu_cores: as `system_profiler SPDisplaysDataType` says; None takes the smallest variant of that name.

    Raises:
        SettingsError: not in the table; says what to write into rack.yaml instead.
    """
    match = _BRAND.fullmatch(" ".join(brand.split()))
    name = f"{match[1].upper()} {(match[2] or '').capitalize()}".strip() if match else ""
    variants = _PUBLISHED.get(name)
    if variants is None:
        raise SettingsError(
            f"The chip {brand!r} is not in the table (it has {', '.join(_PUBLISHED)}): give the Mac "
            "`bandwidth: <n>GB/s` and `flops: <n>TFLOPS` in rack.yaml."
        )
    cores = min(variants) if gpu_cores is None else gpu_cores
    if cores not in variants:
        raise SettingsError(
            f"There is no {name} with {cores} GPU cores (only {' or '.join(map(str, variants))}): correct `gpu_cores`, "
            "or give `bandwidth: <n>GB/s` and `flops: <n>TFLOPS` in rack.yaml."
        )
    return CHIPS[name, cores]
