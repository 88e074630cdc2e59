"""A finding of `pomarium doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One line of the report. `cure` None means that all is well; `fatal` False is advice."""

    subject: str
    state: str
    cure: str | None = None
    fatal: bool = True
