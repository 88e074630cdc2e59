"""What the sections of `pomarium selftest` tell, one event at a time: a report holds what was seen before a death.

section --Begin, Row, Row, Begin, ...--> a line of JSON each --> the process that prints the report
"""

import json
import traceback
from dataclasses import asdict, dataclass
from enum import StrEnum

MOST_LINES = 12
"""Of a compiler's log or an error's text in a report."""


class Verdict(StrEnum):
    """Of a row, as it is printed."""

    OK = "ok"
    WRONG = "WRONG"
    FAILED = "FAILED"
    NOT_RUN = "not run"
    FACT = ""


@dataclass(frozen=True)
class Row:
    """Attributes:
    name: what was looked at. text: what was seen, one line. detail: lines below it.
    """

    name: str
    verdict: Verdict
    text: str
    detail: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the self-test fails by it."""
        return self.verdict in (Verdict.WRONG, Verdict.FAILED)


@dataclass(frozen=True)
class Begin:
    """What runs now: the name of the row that a sudden end stands for."""

    name: str


Event = Begin | Row


def fact(name: str, text: str) -> Row:
    """A row that cannot fail."""
    return Row(name, Verdict.FACT, text)


def failure(name: str, error: Exception) -> Row:
    """A row instead of a traceback: what was raised, the lines that name errors first, and where."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()] or [""]
    told = [line for line in lines[1:] if "error" in line.lower()] or lines[1:]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"raised in {frame.name}, {frame.filename}:{frame.lineno}"
    return Row(name, Verdict.FAILED, f"{type(error).__name__}: {lines[0]}", (*told[:MOST_LINES], where))


def to_json(event: Event) -> str:
    """One line."""
    return json.dumps({"event": type(event).__name__, **asdict(event)})


def from_json(line: str) -> Event:
    """The inverse. Raises ValueError or KeyError if it is no event."""
    values = json.loads(line)
    if values["event"] == Begin.__name__:
        return Begin(values["name"])
    return Row(values["name"], Verdict(values["verdict"]), values["text"], tuple(values["detail"]))
