"""Which requests of a batch are still to be asked: an account of custom_ids and lines that lies on disk.

    OUT, ERRORS of an earlier run --Ledger.done--+
    lines of IN --pending--> each once: Request to ask, Rejection to write; answered ones are passed over

An id is kept as bytes: JSON knows text that UTF-8, and with it SQLite's TEXT, does not (lines.py).

A set of a million ids would be a hundred megabytes of memory; SQLite keeps it in a temporary file. It holds nothing
that OUT and ERRORS do not tell again, so it is made anew for each run.
"""

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pomarium.cluster.batch.lines import Rejection, Request, duplicate, parse

CACHE_KIB = 8192


class Ledger:
    """Ids and lines that were seen. A context; its file goes with it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pomarium-batch-")
        self._base = sqlite3.connect(Path(self._folder.name) / "ledger", isolation_level=None)
        self._base.execute("PRAGMA journal_mode = OFF")
        self._base.execute("PRAGMA synchronous = OFF")
        self._base.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._base.execute("CREATE TABLE answered (custom_id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("CREATE TABLE refused (line INTEGER PRIMARY KEY, custom_id BLOB)")
        self._base.execute("CREATE TABLE seen (custom_id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self._base.close()
        self._folder.cleanup()

    def done(self, custom_id: str | None, line: int | None) -> None:
        """OUT (`line` None) or ERRORS holds an answer to it."""
        if line is None:
            self._base.execute("INSERT OR IGNORE INTO answered VALUES (?)", (_key(custom_id),))
        else:
            self._base.execute("INSERT OR REPLACE INTO refused VALUES (?, ?)", (line, _key(custom_id)))

    @property
    def answered(self) -> int:
        """Results that were there before."""
        return int(self._base.execute("SELECT COUNT(*) FROM answered").fetchone()[0])

    @property
    def refused(self) -> int:
        """Errors that were there before."""
        return int(self._base.execute("SELECT COUNT(*) FROM refused").fetchone()[0])

    def pending(self, lines: Iterable[bytes]) -> Iterator[Request | Rejection]:
        """What is left to do, in the order of `lines`. Blank lines count, and ask for nothing."""
        for number, text in enumerate(lines, 1):
            if text.isspace():
                continue
            asked = parse(number, text)
            if isinstance(asked, Request) and not self._first(asked.custom_id):
                asked = duplicate(asked)
            if not self._is_done(asked):
                yield asked

    def _first(self, custom_id: str) -> bool:
        return self._base.execute("INSERT OR IGNORE INTO seen VALUES (?)", (_key(custom_id),)).rowcount == 1

    def _is_done(self, asked: Request | Rejection) -> bool:
        found = self._base.execute("SELECT custom_id FROM refused WHERE line = ?", (asked.line,)).fetchone()
        if found is not None and found[0] == _key(asked.custom_id):
            return True
        if isinstance(asked, Rejection):
            return False
        key = _key(asked.custom_id)
        return self._base.execute("SELECT 1 FROM answered WHERE custom_id = ?", (key,)).fetchone() is not None


def _key(custom_id: str | None) -> bytes | None:
    return None if custom_id is None else custom_id.encode(errors="surrogatepass")
