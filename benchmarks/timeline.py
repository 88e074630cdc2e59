"""Steps over the stages of a pipeline as a picture.

    Intervals by stage, steps --svg--> a lane for each stage, time to the right

Colours follow the reader's light or dark scheme; text never depends on colour alone.
"""

from collections.abc import Sequence
from html import escape

from intervals import COMPUTE, HANDOFF, WAITING, Interval

WIDTH, LEFT, RIGHT, TOP = 860, 70, 14, 40
LANE, GAP, BAR = 40, 14, 30
LEAST_PX, LABEL_PX = 0.6, 13
TICKS_MS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f; }
.lane { fill: #eaeef2; } .grid { stroke: #afb8c1; stroke-width: 1; }
.compute { fill: #2f6fb7; } .odd { fill: #5b9bd9; } .handoff { fill: #d4691a; } .waiting { fill: #b9a7d8; }
.label { fill: #ffffff; font-size: 11px; text-anchor: middle; } .axis { text-anchor: middle; }
@media (prefers-color-scheme: dark) {
  text { fill: #d1d7de; } .lane { fill: #21262d; } .grid { stroke: #484f58; } .label { fill: #ffffff; }
  .compute { fill: #2b62a3; } .odd { fill: #4a86c2; } .handoff { fill: #e8873b; } .waiting { fill: #6e5c96; }
}
""".strip()
LEGEND = ((COMPUTE, "compute"), (HANDOFF, "handoff"), (WAITING, "waits for its neighbour"), ("lane", "no step to do"))


def svg(stages: Sequence[Sequence[Interval]], steps: range, title: str) -> str:
    """All stages while the first one is at `steps`. `title` is for readers who do not see the picture.

    Raises:
        ValueError: the first stage has none of these steps.
    """
    shown = [i for i in stages[0] if i.step in steps]
    if not shown:
        raise ValueError("the first stage has none of the steps")
    began, ended = min(i.start for i in shown), max(i.end for i in shown)
    lanes = [[i for i in intervals if i.end > began and i.start < ended] for intervals in stages]
    scale = (WIDTH - LEFT - RIGHT) / (ended - began)
    bottom = TOP + len(lanes) * (LANE + GAP)
    parts = [*_legend(), *_axis((ended - began) * 1000, scale / 1000, bottom)]
    for rank, lane in enumerate(lanes):
        top = TOP + rank * (LANE + GAP)
        parts.append(f'<text x="8" y="{top + LANE / 2 + 4:g}">stage {rank}</text>')
        parts.append(f'<rect class="lane" x="{LEFT}" y="{top}" width="{WIDTH - LEFT - RIGHT}" height="{LANE}"/>')
        parts += [text for i in lane for text in _bar(i, began, ended, scale, top + (LANE - BAR) / 2)]
    size = f'viewBox="0 0 {WIDTH} {bottom + 34}" width="{WIDTH}" height="{bottom + 34}"'
    head = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">', f"<title>{escape(title)}</title>"]
    return "\n".join([*head, f"<style>\n{STYLE}\n</style>", *parts, "</svg>", ""])


def _bar(interval: Interval, began: float, ended: float, scale: float, top: float) -> list[str]:
    left = LEFT + max(0.0, interval.start - began) * scale
    width = LEFT + (min(interval.end, ended) - began) * scale - left
    odd = " odd" if interval.kind == COMPUTE and interval.step % 2 else ""
    shape = f'x="{left:.1f}" y="{top:g}" width="{max(width, LEAST_PX):.1f}" height="{BAR}"'
    parts = [f'<rect class="{interval.kind}{odd}" {shape}/>']
    if interval.kind == COMPUTE and width >= LABEL_PX:
        middle, base = left + width / 2, top + BAR / 2 + 4
        parts.append(f'<text class="label" x="{middle:.1f}" y="{base:g}">{interval.step % 100}</text>')
    return parts


def _legend() -> list[str]:
    parts, left = [], LEFT
    for kind, words in LEGEND:
        parts.append(f'<rect class="{kind}" x="{left}" y="12" width="12" height="12"/>')
        parts.append(f'<text x="{left + 18}" y="22">{words}</text>')
        left += 44 + 7 * len(words)
    parts.append(f'<text x="{left + 6}" y="22">numbers: steps</text>')
    return parts


def _axis(length_ms: float, px_per_ms: float, bottom: int) -> list[str]:
    tick = next((ms for ms in TICKS_MS if length_ms / ms <= 10), TICKS_MS[-1])
    parts = []
    for number in range(int(length_ms / tick) + 1):
        left = LEFT + number * tick * px_per_ms
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
        parts.append(f'<text class="axis" x="{left:.1f}" y="{bottom + 18}">{number * tick}</text>')
    parts.append(f'<text x="8" y="{bottom + 18}">ms</text>')
    return parts
