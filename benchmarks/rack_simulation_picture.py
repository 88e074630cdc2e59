"""A day of a rack as a picture.

    samples of each policy --svg--> Macs that do not sleep, replicas that are up, requests that wait; a day to the right

Colours follow the reader's light or dark scheme. Lines differ in their dashes too; requests that wait have lanes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from rack_simulation_day import Sample
from rack_simulation_load import DAY_S

WIDTH, LEFT, RIGHT, TOP = 860, 52, 14, 64
PLOT, GAP = 150, 46
LANE, LANE_GAP = 52, 12
HOURS = range(0, 25, 3)
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.title { font-weight: 600; } .x { text-anchor: middle; } .y { text-anchor: end; }
.plot { fill: #f6f8fa; } .grid { stroke: #d0d7de; stroke-width: 1; }
.line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.line0 { stroke: #6e7781; stroke-dasharray: 2 3; } .line1 { stroke: #d4691a; stroke-dasharray: 7 3; }
.line2 { stroke: #8250df; stroke-dasharray: 3 2; } .line3 { stroke: #2f6fb7; stroke-width: 2.2; }
.solid { stroke-dasharray: none; stroke-width: 1.6; }
@media (prefers-color-scheme: dark) {
  text { fill: #d1d7de; } .plot { fill: #161b22; } .grid { stroke: #30363d; }
  .line0 { stroke: #8b949e; } .line1 { stroke: #e8873b; } .line2 { stroke: #a983f0; } .line3 { stroke: #5b9bd9; }
}
""".strip()


@dataclass(frozen=True)
class Line:
    """One policy: its samples, a day of them."""

    name: str
    samples: Sequence[Sample]


@dataclass(frozen=True)
class Plot:
    """One of the plots.

    Attributes:
        ticks: on the axis, ascending from zero; the last one is its top.
        high: pixels. logarithmic: log(1 + value) is drawn.
    """

    value: Callable[[Sample], int]
    ticks: Sequence[int]
    high: int = PLOT
    logarithmic: bool = False

    def height(self, value: float) -> float:
        """Above the bottom, pixels."""
        of: Callable[[float], float] = math.log1p if self.logarithmic else float
        return self.high * of(value) / of(self.ticks[-1])


def svg(lines: Sequence[Line], macs: int, title: str) -> str:
    """All plots. `title` is for readers who do not see the picture. At most four lines; the last one is ours."""
    replicas = max(sample.up for line in lines for sample in line.samples)
    waiting = [line for line in lines if any(sample.waiting for sample in line.samples)]
    most = max((sample.waiting for line in waiting for sample in line.samples), default=1)
    parts, top = _legend(lines), TOP
    for words, plot in (
        (f"Macs that do not sleep, of {macs}", Plot(lambda sample: sample.awake, _quarters(macs))),
        ("replicas that take requests", Plot(lambda sample: sample.up, _quarters(replicas))),
    ):
        parts += [_title(words, top), *_grid(plot, top), *_hours(top + PLOT)]
        parts += [_curve(plot, line, lines, top) for line in lines]
        top += PLOT + GAP
    parts.append(_title("requests that wait, most within 5 minutes", top))
    lane = Plot(lambda sample: sample.waiting, _tens(most), LANE, logarithmic=True)
    for line in waiting:
        parts += [*_grid(lane, top), _curve(lane, line, lines, top), _text(LEFT + 8, top + 14, line.name)]
        top += LANE + LANE_GAP
    bottom = top - LANE_GAP
    parts += [*_hours(bottom), _text((LEFT + WIDTH - RIGHT) / 2, bottom + 36, "hour of the day", "x")]
    size = f'viewBox="0 0 {WIDTH} {bottom + 44}" width="{WIDTH}" height="{bottom + 44}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{escape(title)}</title>"]
    return "\n".join([*head, f"<style>\n{STYLE}\n</style>", *parts, "</svg>", ""])


def _quarters(most: int) -> Sequence[int]:
    return [round(most * quarter / 4) for quarter in range(5)]


def _tens(most: int) -> Sequence[int]:
    return [0, *(10**power for power in range(1, max(1, math.ceil(math.log10(most))) + 1))]


def _title(words: str, top: int) -> str:
    return _text(LEFT, top - 8, words, "title")


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _grid(plot: Plot, top: int) -> list[str]:
    bottom = top + plot.high
    parts = [f'<rect class="plot" x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{plot.high}"/>']
    for tick in plot.ticks:
        y = bottom - plot.height(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:,}", "y"))
    for hour in HOURS:
        x = _x(hour * 3600)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
    return parts


def _hours(bottom: int) -> list[str]:
    return [_text(_x(hour * 3600), bottom + 16, str(hour), "x") for hour in HOURS]


def _curve(plot: Plot, line: Line, lines: Sequence[Line], top: int) -> str:
    dashes = " solid" if plot.logarithmic else ""
    number = lines.index(line)
    return f'<path class="line line{number}{dashes}" d="{_path(plot, line.samples, top + plot.high)}"/>'


def _x(second: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * second / DAY_S


def _path(plot: Plot, samples: Sequence[Sample], bottom: int) -> str:
    """Steps, written only where the value changes."""
    first, drawn = samples[0].time, plot.value(samples[0])
    parts = [f"M{LEFT} {bottom - plot.height(drawn):.1f}"]
    for sample in samples[1:]:
        if plot.value(sample) != drawn:
            drawn = plot.value(sample)
            parts.append(f"H{_x(sample.time - first):.1f}V{bottom - plot.height(drawn):.1f}")
    return "".join([*parts, f"H{WIDTH - RIGHT}"])


def _legend(lines: Sequence[Line]) -> list[str]:
    parts, left = [], float(LEFT)
    for number, line in enumerate(lines):
        parts.append(f'<path class="line line{number}" d="M{left:g} 18h30"/>')
        parts.append(f'<text x="{left + 38:g}" y="22">{escape(line.name)}</text>')
        left += 66 + 6.6 * len(line.name)
    return parts
