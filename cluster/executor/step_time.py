"""What a step will take, from what steps were seen to take: pure, no clock.

    Work and seconds of each step --StepTimes.after--> StepTimes --seconds(Work)--> seconds expected of a step

The model. A step of R rows reads the weights once, multiplies R rows with them, and has each row attend to the tokens
before it, P pairs of a row and a token in all:

    seconds = a + b R + c P,  all three at least 0

c is why 512 tokens of a prompt at position 30,000 are not those at position 0; Where layers
have a window, P stops to count: what was seen at long contexts makes c small.

What is remembered. Forgetting by time alone would lose, over minutes of decoding, what a prompt costs. So the latest
KEPT steps of each kind are kept, a kind being rows and context to a factor of two, and count the less the more steps
with prompts came after them: half after HALF. The line is fitted by least squares with non-negative coefficients
(Lawson and Hanson, "Solving Least Squares Problems", ch. 23; three unknowns, so all seven sets of positive ones are
tried). Errors count relative to the step's time, but below `grain_s` as that much: noise of milliseconds is not to be
explained.
Where the steps leave the coefficients open, a small ridge shares the time out, the fixed part least: too much is
expected of a larger step then, not too little.

The line is corrected by `slowness`, how far a step exceeded it of late: taken at once, given back slowly (RELEASE).
A device that becomes ten times slower is believed after one step, and one odd step costs some steps of caution.

A line is kept while steps take what it says (AGREES). It may then say too much of larger steps, so whoever is about to
act on its word asks again (`fresh`). On a device whose steps are all short it is hardly ever fitted.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, combinations

import numpy as np

KEPT = 4
HALF = 32
RELEASE = 0.3
"""Share of the logarithm of `slowness` that a step with prompts, as fast as expected, takes away."""
AGREES = 0.1
RIDGE = (1e-2, 1e-4, 1e-4)
"""Of the fixed part, the rows and the pairs: what could be either is rather the rows'."""


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Attributes:
        rows: tokens. pairs: over all rows, how many tokens each attends to.
        prompts: it holds rows of prompts.
    """

    rows: int = 0
    pairs: int = 0
    prompts: bool = False

    def __add__(self, other: "Work") -> "Work":
        return Work(self.rows + other.rows, self.pairs + other.pairs, self.prompts or other.prompts)


def rows_at(position: int, tokens: int, prompts: bool = True) -> Work:
    """`tokens` of one sequence, the first at `position`: each attends to those before it and to itself."""
    return Work(tokens, tokens * position + tokens * (tokens + 1) // 2, prompts)


@dataclass(frozen=True)
class Line:
    """Seconds of a step: fixed, per row, per pair."""

    fixed: float
    row: float
    pair: float

    def of(self, work: Work) -> float:
        """Seconds of `work`."""
        return self.fixed + self.row * work.rows + self.pair * work.pairs


@dataclass(frozen=True)
class Seen:
    """One step. `turn`: how many steps with prompts had been seen."""

    work: Work
    seconds: float
    turn: int


Kind = tuple[int, int]


@dataclass(frozen=True)
class StepTimes:
    """What is known of a device; see the module.

    Attributes:
        grain_s: what is shorter is noise.
        turns: steps with prompts seen so far.
        slowness: at least 1.
        line: kept from the steps before; None: to be fitted.
    """

    grain_s: float
    seen: Mapping[Kind, tuple[Seen, ...]] = field(default_factory=dict)
    turns: int = 0
    slowness: float = 1.0
    line: Line | None = None

    def after(self, work: Work, seconds: float) -> "StepTimes":
        """These and one step more."""
        turns = self.turns + work.prompts
        kept = dict(self.seen)
        kind = work.rows.bit_length(), (work.pairs // max(1, work.rows)).bit_length()
        kept[kind] = (*kept.get(kind, ())[-KEPT + 1 :], Seen(work, seconds, turns))
        line = self._line if self.seen and abs(self._excess(work, seconds) - 1) < AGREES else None
        return replace(self, seen=kept, turns=turns, slowness=self._slowness_after(work, seconds), line=line)

    def seconds(self, work: Work) -> float:
        """Expected of `work`; 0 while nothing was seen."""
        return self.slowness * self._line.of(work)

    def fresh(self) -> "StepTimes":
        """These with a line through all that was seen."""
        return self if self.line is None else replace(self, line=None)

    @property
    def most_rows(self) -> int:
        """Of the steps with prompts that are remembered; 0 without one."""
        return max((seen.work.rows for seen in self._steps() if seen.work.prompts), default=0)

    def _slowness_after(self, work: Work, seconds: float) -> float:
        if not self.seen or (not work.prompts and seconds <= self.grain_s):
            return self.slowness
        ratio = self._excess(work, seconds)
        if ratio >= self.slowness:
            return ratio
        if not work.prompts:
            return self.slowness
        return float(self.slowness ** (1 - RELEASE) * max(ratio, 1.0) ** RELEASE)

    def _excess(self, work: Work, seconds: float) -> float:
        """How many times what the line says."""
        return max(seconds, self.grain_s) / max(self._line.of(work), self.grain_s)

    def _steps(self) -> Iterable[Seen]:
        return chain.from_iterable(self.seen.values())

    @cached_property
    def _line(self) -> Line:
        return self.line or fit(
            [(seen.work, seen.seconds, HALF / (HALF + self.turns - seen.turn)) for seen in self._steps()], self.grain_s
        )


def fit(steps: Iterable[tuple[Work, float, float]], grain_s: float) -> Line:
    """The line through steps, their seconds and weights; see the module. Without steps, one that is 0 everywhere."""
    found = [(1.0, work.rows, work.pairs, seconds, weight) for work, seconds, weight in steps]
    if not found:
        return Line(0.0, 0.0, 0.0)
    table = np.array(found, np.float64)
    table[:, :4] *= np.sqrt(table[:, 4:]) / np.maximum(table[:, 3:4], grain_s)
    scale = np.maximum(np.sqrt((table[:, :3] ** 2).sum(axis=0)), np.finfo(np.float64).tiny)
    columns, seconds = table[:, :3] / scale, table[:, 3]
    gram, moments = columns.T @ columns + np.diag(RIDGE), columns.T @ seconds
    best, least = np.zeros(3), 0.0
    for used in chain.from_iterable(combinations(range(3), count) for count in (3, 2, 1)):
        chosen = list(used)
        solved = np.linalg.solve(gram[np.ix_(chosen, chosen)], moments[chosen])
        # With the gradient 0 on the chosen ones, what the error falls by is the product with the moments.
        if (solved >= 0).all() and -(gained := float(moments[chosen] @ solved)) < least:
            best, least = np.zeros(3), -gained
            best[chosen] = solved
            if len(chosen) == 3:
                break
    return Line(*(best / scale).tolist())
