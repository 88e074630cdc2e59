"""The process of one section: `python -m pomarium.cluster.selftest.child SECTION DONE GIVEN`, the last two JSON lists.

stdout carries events, one line of JSON each, and ENDED behind the last; what libraries print goes to stderr.
"""

import json
import os
import signal
import sys
from dataclasses import replace
from types import FrameType

from pomarium.cluster.machine import disk
from pomarium.cluster.selftest.process import ENDED
from pomarium.cluster.selftest.sections import SECTIONS
from pomarium.worker import command_buffers
from pomarium.worker.errors import PomariumError
from pomarium.worker.selftest_rows import Begin, Row, Verdict, failure, to_json


def main(section: str, done: str, given: str) -> None:
    """Run it; what it raises is a row."""
    signal.signal(signal.SIGTERM, _leave)
    command_buffers.prepare(os.environ)  # kernels are timed as the worker runs them
    with os.fdopen(os.dup(1), "w") as events:
        os.dup2(2, 1)

        def tell(line: str) -> None:
            events.write(f"{line}\n")
            events.flush()

        begun = section
        try:
            for event in SECTIONS[section](frozenset(json.loads(done)), json.loads(given)):
                if isinstance(event, Begin):
                    begun = event.name
                tell(to_json(event))
        except PomariumError as error:
            tell(to_json(Row(begun, Verdict.FAILED, " ".join(str(error).split()))))
        except Exception as error:  # noqa: BLE001 - the report is to go on, and to tell of it
            tell(to_json(_told(failure(begun, error))))
        tell(ENDED)


def _told(row: Row) -> Row:
    """With the sentence on a full disk, which libraries name in many ways and not by its name."""
    try:
        sentence = disk.shortage(disk.rooms(disk.ray_parent(os.environ)))
    except PomariumError as error:
        sentence = str(error)
    return row if sentence is None else replace(row, detail=(*row.detail, sentence))


def _leave(number: int, frame: FrameType | None) -> None:
    """As an exception, so that a section ends what it started."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main(*sys.argv[1:4])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # all is told; what libraries do at the interpreter's end is no part of it
