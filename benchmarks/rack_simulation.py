"""Days of a rack whose Macs wake for work and sleep without it, simulated, under several policies.

    Macs x load curve x policy --rack_simulation_day--> waits, energy, wakes --> Markdown, SVG

Ours is cluster/autoscaling/policy.py itself. Everything is seeded: the same command prints the same figures.

    python benchmarks/rack_simulation.py [--parts compare light choices] [--picture docs/images/rack_simulation.svg]
    python benchmarks/rack_simulation.py --short
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rack_simulation_day import SAMPLE_S, Day, ModelSpec, Setting, play
from rack_simulation_load import DAY_S, Curve, requests
from rack_simulation_picture import Line, svg
from rack_simulation_policies import (
    RAY_IDLE_S,
    SERVE_REPORT_S,
    SERVE_TARGET,
    Always,
    Contender,
    Ours,
    Reported,
    ServeDefaults,
)
from report import table

from pomarium.cluster.autoscaling.policy import ReplicaPolicy, WakePolicy

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "rack_simulation.svg"
PARTS = ("compare", "light", "choices")
RACKS = ((8, 7), (64, 2), (512, 1))
"""Macs, days: a small rack needs more of them for as many requests."""
SHORT = ((8, 1),)
PICTURED = 64
SEED = 1

SLOTS = 8
LOAD_S = (20.0, 40.0)
"""Of a model on one Mac, and of one in two stages; inputs (`benchmarks/autoscale.py` measures them without Macs)."""
WORK_S, WORK_SIGMA = 40.0, 0.8
"""Computing a request takes so long on average; lognormal."""
PEAK = 0.6
LIGHT = 0.1
"""Share of all slots that the curve keeps busy at its peak, without bursts; on a rack that is little used."""


@dataclass(frozen=True)
class Choice:
    """What we choose: the fields of ReplicaPolicy, rack.yaml's sleep.idle, and how Serve reports.

    Attributes:
        window_s, report_s: look_back_period_s as cluster/endpoint/replica_scaling.py sets it, and Serve's own.
    """

    target: float = SLOTS
    keep_s: float = 600.0
    headroom: float = 0.15
    idle_s: float = 900.0
    window_s: float = 12.0
    report_s: float = SERVE_REPORT_S

    def contender(self, name: str) -> Contender:
        """Under this name."""
        return Contender(name, self._scaler, self.idle_s)

    def _scaler(self, maximum: int) -> Ours:
        policy = ReplicaPolicy(0, maximum, self.target, self.keep_s, self.headroom)
        return Ours(policy, Reported(self.window_s, self.report_s))


OURS = Choice()
UNSTEADY = replace(OURS, keep_s=0.0, headroom=0.0, idle_s=60.0, window_s=0.0, report_s=1.0).contender(
    "need of the moment, idle 1 min"
)
CONTENDERS = (
    Contender("all awake", Always, None),
    Contender("Serve's and Ray's defaults", lambda maximum: ServeDefaults(maximum, SERVE_TARGET), RAY_IDLE_S),
    Contender("the same, target 8", lambda maximum: ServeDefaults(maximum, SLOTS), RAY_IDLE_S),
    UNSTEADY,
    OURS.contender("ours"),
)
CHOICES = (
    ("ours: keep 10 min, headroom 15%, idle 15 min", OURS),
    *((f"headroom {share:.0%}", replace(OURS, headroom=share)) for share in (0.0, 0.05, 0.1, 0.2, 0.25, 0.4)),
    *((f"keep {minutes:g} min", replace(OURS, keep_s=60 * minutes)) for minutes in (0, 1, 5, 15, 30)),
    *((f"idle {minutes:g} min", replace(OURS, idle_s=60 * minutes)) for minutes in (1, 5, 30)),
    ("keep 30 min, idle 1 min", replace(OURS, keep_s=1800.0, idle_s=60.0)),
    ("target 6", replace(OURS, target=6.0)),
    ("Serve's window, 30 s", replace(OURS, window_s=30.0)),
    ("reports each second, window 2 s", replace(OURS, window_s=2.0, report_s=1.0)),
)
DEADLINES_S = (180.0, 60.0)


def main() -> None:
    """See the module."""
    options = _options()
    if options.short:
        print(compared(8, 1)[0])
        return
    if "compare" in options.parts:
        for macs, days in RACKS:
            text, played = compared(macs, days)
            print(text + "\n")
            if macs == PICTURED:
                options.picture.write_text(picture(macs, played))
    if "light" in options.parts:
        print(f"Peaks at {LIGHT:.0%} of all slots:\n\n{compared(PICTURED, 2, LIGHT)[0]}\n")
    if "choices" in options.parts:
        print(choices(RACKS[:2]) + "\n")
        print(deadlines(*RACKS[0]))


def setting(macs: int, days: float, peak: float = PEAK, seed: int = SEED) -> Setting:
    """Half of the Macs for a model on one Mac, half for one on groups of two, each with the load curve for itself."""
    length_s = days * DAY_S
    models = []
    for stages, load_s in zip((1, 2), LOAD_S, strict=True):
        spec = ModelSpec(f"{stages} of {macs}", stages, macs // 2 // stages, SLOTS, load_s)
        rate = peak * spec.replicas * SLOTS / WORK_S
        models.append((spec, requests(Curve(), rate, WORK_S, WORK_SIGMA, seed + 10 * stages, length_s)))
    return Setting(macs, models, seed=seed, length_s=length_s)


def compared(macs: int, days: int, peak: float = PEAK) -> tuple[str, dict[str, Day]]:
    """All contenders on one rack: a table, and the days."""
    rack = setting(macs, days, peak)
    played = {contender.name: play(rack, contender) for contender in CONTENDERS}
    count = sum(len(asked.times) for _, asked in rack.models)
    title = f"{macs} Macs, {days} day{'s' if days > 1 else ''}, {count:,} requests"
    header = [title, "wait, s: mean", "p50", "p99", "worst", "over 1 s"]
    header += ["kWh a day", "without answering", "wakes per Mac and day", "most", "failed wakes"]
    return table(header, [[name, *_waits(day), *_costs(day, days)] for name, day in played.items()]), played


def _waits(day: Day) -> list[str]:
    figures = [sum(day.waits) / day.requests, *(wait_at(day, share) for share in (0.5, 0.99, 1.0))]
    return [f"{figures[0]:.2f}", *(f"{figure:.1f}" for figure in figures[1:]), _late(day)]


def wait_at(day: Day, share: float) -> float:
    """The wait that this share of all requests does not exceed, seconds (nearest rank)."""
    rank = math.ceil(share * day.requests) - (day.requests - len(day.waits))
    return day.waits[rank - 1] if rank > 0 else 0.0


def _late(day: Day) -> str:
    return f"{sum(wait > 1 for wait in day.waits) / day.requests:.2%}"


def _costs(day: Day, days: int) -> list[str]:
    energy = [joules / 3.6e6 / days for joules in (day.joules, day.joules - day.answering)]
    wakes = [sum(day.wakes) / len(day.wakes) / days, max(day.wakes) / days]
    return [*(f"{kwh:.2f}" for kwh in energy), *(f"{number:.1f}" for number in wakes), str(day.failed_wakes)]


def choices(racks: Sequence[tuple[int, int]]) -> str:
    """What each of our choices does, one changed at a time."""
    rows = [[name] for name, _ in CHOICES]
    header = ["changed"]
    for macs, days in racks:
        header += [f"{macs} Macs: wait over 1 s", "mean, s", "kWh without answering", "wakes"]
        rack = setting(macs, days)
        for row, (name, choice) in zip(rows, CHOICES, strict=True):
            day = play(rack, choice.contender(name))
            costs = _costs(day, days)
            row += [_late(day), f"{sum(day.waits) / day.requests:.2f}", *costs[1:3]]
    return table(header, rows)


def deadlines(macs: int, days: int) -> str:
    """What the deadline of a wake does where a tenth of them fails."""
    rack = setting(macs, days)
    rack = replace(rack, hardware=replace(rack.hardware, failing=0.1))
    rows = []
    for seconds in DEADLINES_S:
        day = play(replace(rack, wakes=WakePolicy(deadline_s=seconds)), OURS.contender("ours"))
        rows.append([f"{seconds:g} s", *_waits(day), str(day.failed_wakes)])
    title = f"deadline; {macs} Macs, a tenth of wakes fails"
    return table([title, "wait, s: mean", "p50", "p99", "worst", "over 1 s", "failed wakes"], rows)


def picture(macs: int, played: dict[str, Day]) -> str:
    """The last day of all but the policy without memory, whose lines would hide the others."""
    shown = [contender.name for contender in CONTENDERS if contender is not UNSTEADY]
    lines = [Line(name, played[name].samples[-round(DAY_S / SAMPLE_S) - 1 :]) for name in shown]
    return svg(lines, macs, f"A day of a simulated rack of {macs} Macs under {len(lines)} policies")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where the plot is written")
    parser.add_argument("--short", action="store_true", help="one day of 8 Macs, no picture")
    return parser.parse_args()


if __name__ == "__main__":
    main()
