"""The terminal while a command runs: phases with their time, and everything noisy kept out of sight in a log file.

vLLM, Ray and their processes write to the file descriptors 1 and 2. `Terminal` keeps copies of these for itself and
points the descriptors at the log file, so that only what is meant for the user is seen.
"""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pomarium.cluster.machine.state import made, state_folder, unwritable

NAME_WIDTH = 8


class Terminal:
    """What the user sees, written to `out`. `log`: where the rest goes."""

    def __init__(self, out: TextIO, log: Path) -> None:
        self.out = out
        self.log = log
        self._live = out.isatty()
        self._open = False
        """The last line is that of a phase, without its end."""

    def say(self, text: str) -> None:
        """One or more lines."""
        self.out.write(f"{chr(10) * self._open}{text}\n")
        self.out.flush()
        self._open = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """`name` while the phase runs, its duration once it is done; nothing more if it fails."""
        started = time.monotonic()
        if self._live:
            self.out.write(f"{name:<{NAME_WIDTH}} ...")
            self.out.flush()
            self._open = True
        try:
            yield
        except BaseException:
            if self._open:
                self.out.write("\n")
                self._open = False
            raise
        over, self._open = chr(13) if self._open else "", False
        self.say(f"{over}{name:<{NAME_WIDTH}} {time.monotonic() - started:5.1f} s")


@contextmanager
def quiet(log: Path) -> Iterator[Terminal]:
    """A Terminal on the real stdout, with descriptors 1 and 2 in `log` until the context is left.

    Raises:
        SettingsError: the log cannot be written.
    """
    made(log.parent)
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise unwritable(log, error) from error
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        os.dup2(file, 1)
        os.dup2(file, 2)
        with os.fdopen(os.dup(kept[0]), "w", errors="backslashreplace") as out:  # models have names of any alphabet
            yield Terminal(out, log)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, file):
            os.close(descriptor)


def log_file(command: str, environ: Mapping[str, str] = os.environ) -> Path:
    """A new log file's path. Raises SettingsError if there is no place for one."""
    return state_folder(environ) / f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
