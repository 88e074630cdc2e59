"""Samples of all rounds as Markdown tables.

    {system: [Sample, ...]} --summaries--> {(system, measure): Summary} --tables--> text

The best round stands in a table: noise on a shared machine only ever slows down. The spread follows in brackets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from measure import Sample, mebibytes
from systems import KV_BYTES, SPECS, Spec

REFERENCE = "mlx-batch"
GAP_REFERENCE = "mlx-server"
_MORE_IS_BETTER = ("throughput/", "per_cpu_second/")


@dataclass(frozen=True)
class Summary:
    """One measure of one system over its rounds.

    Attributes:
        others: the busiest round's cores in foreign use.
    """

    best: float
    low: float
    high: float
    others: float = 0.0


Summaries = Mapping[tuple[str, str], Summary]


def summaries(samples: Mapping[str, Sequence[Sample]]) -> Summaries:
    """Group by system and measure; the highest throughput and the lowest of anything else is the best."""
    grouped: dict[tuple[str, str], list[Sample]] = {}
    for system, found in samples.items():
        for sample in found:
            grouped.setdefault((system, sample.measure), []).append(sample)
    result = {}
    for (system, measure), group in grouped.items():
        values = [sample.value for sample in group]
        best = max(values) if measure.startswith(_MORE_IS_BETTER) else min(values)
        result[system, measure] = Summary(best, min(values), max(values), max(sample.others for sample in group))
    return result


def ratio(value: Summary | None, reference: Summary | None) -> str:
    """Best over best, for example "1.12x"; a dash where one is missing or the reference is zero."""
    if value is None or reference is None or reference.best == 0:
        return "–"
    return f"{value.best / reference.best:.2f}x"


def cell(summary: Summary | None, digits: int) -> str:
    """The best, and in brackets the spread if there was more than one round; a dash for what was not measured."""
    if summary is None:
        return "–"
    if summary.low == summary.high:
        return f"{summary.best:.{digits}f}"
    return f"{summary.best:.{digits}f} ({summary.low:.{digits}f}–{summary.high:.{digits}f})"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right of the first column."""
    lines = [header, ["---", *("---:" for _ in header[1:])], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(found: Summaries, weight_bytes: int) -> str:
    """All tables for which there are figures."""
    parts = [
        _by_streams(found, "throughput", "tokens/s"),
        _by_streams(found, "per_cpu_second", "tokens per second of processor time"),
        _first_token(found),
        _gap(found),
        _memory(found, weight_bytes),
    ]
    return "\n\n".join(part for part in parts if part)


def _with(found: Summaries, measure: str) -> list[Spec]:
    return [spec for spec in SPECS if any((spec.name, name) in found for name in (measure,))]


def _by_streams(found: Summaries, kind: str, title: str) -> str:
    streams = sorted({int(measure.split("/")[1]) for _, measure in found if measure.startswith(f"{kind}/")})
    if not streams:
        return ""
    specs = [spec for spec in SPECS if any((spec.name, f"{kind}/{count}") in found for count in streams)]
    rows = []
    for spec in specs:
        row = [spec.label]
        for count in streams:
            measure = f"{kind}/{count}"
            own = found.get((spec.name, measure))
            row += [cell(own, 1), ratio(own, found.get((REFERENCE, measure)))]
        measured = [found[spec.name, f"{kind}/{count}"] for count in streams if (spec.name, f"{kind}/{count}") in found]
        rows.append([*row, f"{max(summary.others for summary in measured):.2f}"])
    header = [title]
    for count in streams:
        header += [f"{count} stream{'s' if count > 1 else ''}", "to mlx-lm"]
    return table([*header, "others' cores"], rows)


def _first_token(found: Summaries) -> str:
    rows = []
    for spec in _with(found, "first_token/cold"):
        cold, hit = found[spec.name, "first_token/cold"], found[spec.name, "first_token/hit"]
        others = max(cold.others, hit.others)
        rows.append([spec.label, cell(cold, 2), cell(hit, 2), ratio(hit, cold), f"{others:.2f}"])
    header = ["time to first token, s", "cold", "prefix known", "known to cold", "others' cores"]
    return table(header, rows) if rows else ""


def _gap(found: Summaries) -> str:
    rows = []
    for spec in _with(found, "gap/during"):
        before, during, first = (found[spec.name, f"gap/{name}"] for name in ("before", "during", "first_token"))
        chunk = spec.gap_chunk if spec.kind == "vllm" else spec.chunk
        reference = found.get((GAP_REFERENCE, "gap/during"))
        figures = [cell(before, 2), cell(during, 2), ratio(during, reference), cell(first, 1)]
        rows.append([spec.label, str(chunk), *figures, f"{during.others:.2f}"])
    header = [
        "gap between tokens, s",
        "step",
        "median before",
        "worst meanwhile",
        "to mlx-lm server",
        "its first token",
        "others' cores",
    ]
    return table(header, rows) if rows else ""


def _memory(found: Summaries, weight_bytes: int) -> str:
    rows = []
    for spec in _with(found, "memory/peak"):
        peak = found[spec.name, "memory/peak"].best
        pool = KV_BYTES if spec.kind == "vllm" else 0
        rest = peak - weight_bytes - pool
        pool_text = str(mebibytes(pool)) if pool else "grows"
        rows.append([spec.label, str(mebibytes(peak)), str(mebibytes(weight_bytes)), pool_text, str(mebibytes(rest))])
    return table(["peak memory, MiB", "peak", "weights", "KV pool", "rest"], rows) if rows else ""
