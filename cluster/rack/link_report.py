"""What was measured of a rack's links, as a table for people and as the `links:` of rack.yaml. Pure functions.

directions(names) --(measured one by one)--> Measured ... --row--> table
                                                          --entry--> links: pairs: of rack.yaml
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.cluster.machine.units import format_seconds
from pomarium.worker.handoff.probe import LinkFacts

_RATES = ((1e12, "Tb/s"), (1e9, "Gb/s"), (1e6, "Mb/s"), (1e3, "kb/s"))
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"))


@dataclass(frozen=True)
class Measured:
    """One direction of a link. `result`: what was measured, or why nothing was."""

    here: str
    there: str
    result: LinkFacts | str


def directions(names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Each pair of Macs, there and back."""
    return tuple(way for one, two in itertools.combinations(names, 2) for way in ((one, two), (two, one)))


def header(names: Sequence[str]) -> str:
    """First line of the table whose other lines are of `row`."""
    width = _width(names)
    return f"{'from':<{width}}  {'to':<{width}}  {'round trip':>10}  {'bandwidth':>10}"


def row(measured: Measured, names: Sequence[str]) -> str:
    """A line of the table."""
    width = _width(names)
    ends = f"{measured.here:<{width}}  {measured.there:<{width}}"
    if isinstance(measured.result, str):
        return f"{ends}  not measured: {measured.result}"
    facts = measured.result
    return f"{ends}  {format_seconds(facts.rtt_s):>10}  {rate(facts.bandwidth_bytes_per_s):>10}"


def entry(measured: Sequence[Measured], names: Sequence[str]) -> str:
    """The `links:` of rack.yaml with the pairs of which both directions were measured; empty if there is none.

    A pair has the bandwidth of its slower direction. Its latency, one way, is half of the quicker round trip, for other
    work on the Macs only ever adds to one.
    """
    facts = {(m.here, m.there): m.result for m in measured if isinstance(m.result, LinkFacts)}
    lines = []
    for here, there in itertools.combinations(names, 2):
        forth, back = facts.get((here, there)), facts.get((there, here))
        if forth is None or back is None:
            continue
        lines += [
            f"    - between: [{here}, {there}]",
            f"      bandwidth: {rate(min(forth.bandwidth_bytes_per_s, back.bandwidth_bytes_per_s))}",
            f"      latency: {duration(min(forth.rtt_s, back.rtt_s) / 2)}",
        ]
    return "\n".join(("links:", "  pairs:", *lines)) if lines else ""


def rate(bytes_per_s: float) -> str:
    """Bytes per second in bits, as `units.parse_rate` reads it."""
    return _scaled(bytes_per_s * 8, _RATES)


def duration(seconds: float) -> str:
    """Seconds as `units.parse_duration` reads them."""
    return _scaled(seconds, _TIMES)


def _scaled(value: float, units: Sequence[tuple[float, str]]) -> str:
    factor, unit = next((known for known in units if value >= known[0]), units[-1])
    # Four digits, but never an exponent.
    number = f"{value / factor:.4g}" if 1 <= value / factor < 1000 else f"{value / factor:.3f}"
    return number + unit


def _width(names: Sequence[str]) -> int:
    return max(map(len, (*names, "from")))
