"""A `pomarium` command at a terminal of its own: what is typed, what it shows, and Ctrl-C as the terminal sends it."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

DEADLINE_S, AGAIN_S = 300.0, 20.0
SIZE = (24, 120)
"""Rows and columns; bars are not drawn where there are none."""
CTRL_C, CTRL_D = "\x03", "\x04"
COMMAND = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "  # else Ctrl-C is a character like others
    "from pomarium.cluster.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


class Typed:
    """A command that runs until the context is left."""

    def __init__(self, arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self._terminal, own = pty.openpty()
        fcntl.ioctl(own, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.shown = ""
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            stdin=own, stdout=own, stderr=own, env={**environ, "TERM": "dumb"}, start_new_session=True,
        )  # fmt: skip
        os.close(own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            os.kill(self._process.pid, signal.SIGKILL)
            self._process.wait()
        os.close(self._terminal)

    def type(self, text: str) -> None:
        """As at the keyboard."""
        os.write(self._terminal, text.encode())

    def until(self, text: str) -> str:
        """What was shown up to the end of `text`, since the last call."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            assert self._read(), f"ended with {text!r} not shown: {self.shown}"
        seen, _, self.shown = self.shown.partition(text)
        return seen + text

    def more(self, characters: int) -> str:
        """What was shown since the last call, once it is so long."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.shown.strip()) < characters:
            assert time.monotonic() < deadline, self.shown
            assert self._read(), f"ended with no more shown: {self.shown}"
        seen, self.shown = self.shown, ""
        return seen

    def ended(self, key: str = "") -> int:
        """The exit code, once it has ended by itself. key: typed, and again while nothing happens: a Ctrl-C that comes
        while `input` is about to wait is only seen with the next one (CPython's readline.c)."""
        deadline, typed_at = time.monotonic() + DEADLINE_S, time.monotonic()
        self.type(key)
        while self._read():
            assert time.monotonic() < deadline, self.shown
            if key and time.monotonic() - typed_at > AGAIN_S:
                self.type(key)
                typed_at = time.monotonic()
        return self._process.wait(DEADLINE_S)

    def _read(self) -> bool:
        """Read something; False once nothing more can come."""
        if not select.select([self._terminal], [], [], 1.0)[0]:
            return True
        try:
            found = os.read(self._terminal, 65536)
        except OSError:  # Linux's word for the other end's being closed
            return False
        self.shown += found.decode(errors="replace")
        return bool(found)
