"""Quantities as people write them -> SI numbers: "64GiB", "800GB/s", "2.5Gb/s", "14TFLOPS", "15m", "22:00".

Units follow SI and IEC 80000-13: GB is 10^9 bytes, GiB 2^30; a small b is a bit (network speeds), a large B a byte.
"""

import math
import re

_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([^\s\d.].*?)?\s*", re.ASCII)
_DECIMAL = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_DECIMAL | _BINARY).items()}
_BYTE_RATES: dict[str, float] = {f"{unit}/s": factor for unit, factor in _BYTES.items()}
_BIT_RATES: dict[str, float] = {
    f"{prefix}{bit}": factor / 8 for prefix, factor in _DECIMAL.items() for bit in ("b/s", "bit/s", "bps")
}
_FLOPS: dict[str, float] = {f"{prefix}FLOPS": factor for prefix, factor in _DECIMAL.items()}
_SECONDS: dict[str, float] = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
_CLOCK = re.compile(r"([01]?\d|2[0-3]):([0-5]\d)", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of "64GiB" or "500MB". Raises ValueError without a unit, for then it is not known what was meant."""
    return round(_quantity(text, dict(_BYTES), "a size such as 64GiB"))


def parse_rate(text: str) -> float:
    """Bytes per second of "800GB/s" or, in bits, "10Gb/s"."""
    return _positive(_quantity(text, _BYTE_RATES | _BIT_RATES, "a speed such as 800GB/s or 10Gb/s"), text)


def parse_flops(text: str) -> float:
    """Floating-point operations per second of "14.2TFLOPS"."""
    return _positive(_quantity(text, _FLOPS, "a computing speed such as 14.2TFLOPS"), text)


def parse_duration(text: str) -> float:
    """Seconds of "15m", "0.3ms" or "1h30m"."""
    pieces = re.findall(r"[\d.]+\s*[^\d.\s]+\s*", text)
    if len(pieces) > 1 and "".join(pieces) == text.strip():
        return sum(parse_duration(piece) for piece in pieces)
    return _quantity(text, _SECONDS, "a duration such as 15m, 1h30m or 0.3ms")


def parse_clock(text: str) -> int:
    """Minutes after midnight of "22:30"."""
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a time of day such as 22:30")
    return 60 * int(match[1]) + int(match[2])


def format_size(size: float) -> str:
    """Bytes in the binary unit that reads best: 63.9 GiB, 412 MiB."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(size) >= factor * 1000 / 1024:
            return f"{size / factor:.3g} {unit}" if abs(size) < 100 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size:.0f} B"


def format_seconds(seconds: float) -> str:
    """Seconds in the unit that reads best: 12.3 ms, 41 us."""
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 or seconds == 0 else f"{seconds * 1e6:.3g} us"


def _quantity(text: str, units: dict[str, float], example: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] or "") not in units:
        raise ValueError(f"{text!r} is not {example}")
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is too large")
    return value


def _positive(value: float, text: str) -> float:
    if value <= 0:
        raise ValueError(f"{text!r} is not more than zero")
    return value
