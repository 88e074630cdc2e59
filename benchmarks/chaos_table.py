"""What chaos.py strikes, in which order, and what it makes of the answers. Pure.

seed --draw--> Strikes --chaos.py: load, strike, heal--> Rounds --table--> lines of Markdown
an answer, that of a quiet run --verdict--> Verdict
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Any

from answers_compared import parted
from measure import percentile

NUMBERS_DIFFER = 1e-3
"""Log-probabilities in another batch: their last digits."""


class Kind(StrEnum):
    """What is struck."""

    WORKER_KILLED = "worker killed"
    WORKER_FROZEN = "worker frozen"
    CORE_KILLED = "EngineCore killed"
    REPLICA_KILLED = "replica killed"
    MAC_KILLED = "Mac killed"
    MAC_FROZEN = "Mac frozen"
    RAYLET_KILLED = "raylet killed"
    CONTROLLER_KILLED = "controller killed"
    INGRESS_KILLED = "ingress killed"
    MAC_DRAINED = "Mac drained"


class Verdict(StrEnum):
    """What became of a request.

    ANSWERED: as in the quiet run. REFUSED: with an error that says why. CUT: its connection broke, as it may where an
    ingress is killed. WRONG: another answer, or an end that looks like one. HUNG: no end in time.
    """

    ANSWERED = "answered"
    REFUSED = "refused"
    CUT = "cut"
    WRONG = "wrong"
    HUNG = "hung"


MAY_CUT = frozenset({Kind.INGRESS_KILLED})
"""Kinds by which a client's own connection may end."""


@dataclass(frozen=True)
class Strike:
    """A fault. engine: which of the engines, or processes, that there are, as a share of their number. after_s: since
    the last stream began."""

    kind: Kind
    engine: float
    after_s: float


@dataclass(frozen=True)
class Round:
    """A strike and what came of it. healthy_s: until all engines served again."""

    kind: Kind
    verdicts: tuple[Verdict, ...]
    healthy_s: float

    @property
    def faultless(self) -> bool:
        """Nothing is wrong or hangs, and no connection broke that had no reason to."""
        bad = {Verdict.WRONG, Verdict.HUNG} | (set() if self.kind in MAY_CUT else {Verdict.CUT})
        return not bad & set(self.verdicts)


def draw(seed: int, count: int, kinds: Sequence[Kind] = tuple(Kind)) -> tuple[Strike, ...]:
    """`count` strikes: all kinds in turns, each turn in another order."""
    random, strikes, left = Random(seed), list[Strike](), list[Kind]()
    while len(strikes) < count:
        if not left:
            left = random.sample(kinds, len(kinds))
        strikes.append(Strike(left.pop(), random.random(), random.uniform(0.0, 2.0)))
    return tuple(strikes)


def verdict(answer: Mapping[str, Any], expected: Mapping[str, Any]) -> Verdict:
    """Of an answer that has ended, as answers_compared.Asked gives it."""
    if "fault" in answer:
        if answer["status"] in (429, 503) and any("error" in event for event in answer["events"]):
            return Verdict.REFUSED
        return Verdict.CUT if answer["fault"] != "None" else Verdict.WRONG
    (form, numbers), (other, others) = parted(answer), parted(expected)
    near = len(numbers) == len(others) and all(
        abs(one - two) < NUMBERS_DIFFER for one, two in zip(numbers, others, strict=True)
    )
    if form == other and near:
        return Verdict.ANSWERED
    return Verdict.REFUSED if refused(answer) else Verdict.WRONG


def refused(answer: Mapping[str, Any]) -> bool:
    """Whether a stream ended with an event that tells of an error."""
    return any(isinstance(part, dict) and part.get("error") for part in answer.values())


def table(rounds: Sequence[Round]) -> list[str]:
    """Faults by kind, and all together."""
    lines = [
        "| fault | times | requests | answered | refused | cut | wrong | hung | healthy, p50 | worst |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups = {str(kind): [one for one in rounds if one.kind is kind] for kind in Kind}
    for name, ones in [*groups.items(), ("all", list(rounds))]:
        if ones:
            found = [verdict for one in ones for verdict in one.verdicts]
            counts = " | ".join(str(found.count(verdict)) for verdict in Verdict)
            seconds = [one.healthy_s for one in ones]
            lines.append(
                f"| {name} | {len(ones)} | {len(found)} | {counts} | {percentile(seconds, 0.5):.0f} s "
                f"| {max(seconds):.0f} s |"
            )
    return lines
