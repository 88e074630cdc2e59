"""The report: text between two fences, each line written as soon as it is known.

Rows --Report.add--> descriptor 1, or 2 once that cannot be written (a file on a full disk)
"""

import os
from collections.abc import Iterable

from pomarium.worker.selftest_rows import Row, Verdict

NAME_WIDTH, VERDICT_WIDTH = 44, 8
STDOUT, STDERR = 1, 2


class Report:
    """Attributes:
    failed: the names of the rows by which the self-test fails.
    """

    def __init__(self, descriptor: int = STDOUT) -> None:
        self._descriptor = descriptor
        self.failed: list[str] = []
        self._rows = 0

    def say(self, text: str) -> None:
        """Lines."""
        data = f"{text}\n".encode(errors="backslashreplace")
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError:
                if self._descriptor == STDERR:
                    raise
                self._descriptor = STDERR

    def section(self, title: str, rows: Iterable[Row]) -> tuple[Row, ...]:
        """Title and rows as they come; returns them."""
        self.say(f"\n{title}")
        told = []
        for row in rows:
            self.add(row)
            told.append(row)
        return tuple(told)

    def add(self, row: Row) -> None:
        """One row, and what is to be seen below it."""
        self._rows += 1
        if row.failed:
            self.failed.append(row.name)
        self.say(line(row))
        for each in row.detail:
            self.say(f"{'':{VERDICT_WIDTH + 4}}{each}")

    def summary(self) -> str:
        """One line."""
        if not self.failed:
            return f"selftest: passed ({self._rows} rows)"
        return f"selftest: FAILED ({len(self.failed)} of {self._rows} rows): {'; '.join(self.failed)}"


def line(row: Row) -> str:
    """A row, aligned."""
    verdict = row.verdict.value if row.verdict is not Verdict.FACT else ""
    return f"  {verdict:<{VERDICT_WIDTH}}{row.name:<{NAME_WIDTH}} {row.text}".rstrip()
