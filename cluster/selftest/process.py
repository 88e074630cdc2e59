"""Runs one section in a process of its own and tells of its end, however it came.

    Section --child.py--> events, stderr --run--> Rows: what was told, then one for a death or a silence

A GPU's driver may abort the process (an Objective-C exception, a command buffer that failed) or never answer. What was
begun then is a row, and the section starts once more behind it, as long as each start gets further.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from pomarium.worker.selftest_rows import Begin, Row, Verdict, from_json

SILENCE_S = 300.0
"""Seconds without an event after which a section hangs: the longest step is a start of an endpoint, a minute on two
loaded cores."""
LAST_WORDS_S = 5.0
"""Seconds for a process that has no more to tell, to end by itself."""
STOP_S = 70.0
"""Seconds for a section that was told to end: an endpoint takes its engine down."""
TAIL_LINES = 8
ENDED = "ended"


@dataclass(frozen=True)
class Section:
    """Attributes:
    name: of a function in sections.py. given: its further argument. resumes: it can go on behind a row.
    """

    name: str
    given: Sequence[str] = ()
    resumes: bool = False


def run(section: Section, environ: Mapping[str, str], silence_s: float = SILENCE_S) -> Iterator[Row]:
    """The section's rows as they come. environ: of its process."""
    done: list[str] = []
    while True:
        child = _Child(section, done, environ)
        begun = section.name
        try:
            for line in child.lines(silence_s):
                event = from_json(line)
                if isinstance(event, Begin):
                    begun = event.name
                    continue
                done.append(event.name)
                yield event
        finally:
            reason = child.end()
        if reason is None:
            return
        yield Row(begun, Verdict.FAILED, reason, child.tail())
        if not section.resumes or begun == section.name or begun in done:
            return
        done.append(begun)


class _Child:
    """The process of one start."""

    def __init__(self, section: Section, done: Sequence[str], environ: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "pomarium.cluster.selftest.child", section.name]
        command += [json.dumps(list(done)), json.dumps(list(section.given))]
        self._process = subprocess.Popen(
            command, env=dict(environ), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._events: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._errors: deque[str] = deque(maxlen=TAIL_LINES)
        self._silent = False
        self._whole = False
        self._readers = [
            threading.Thread(target=self._read_events, args=(_opened(self._process.stdout),), daemon=True),
            threading.Thread(target=self._read_errors, args=(_opened(self._process.stderr),), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def lines(self, silence_s: float) -> Iterator[str]:
        """Events until the process has no more to say, or nothing for too long."""
        while True:
            try:
                line = self._events.get(timeout=silence_s)
            except queue.Empty:
                self._silent = True
                return
            if line is None:
                return
            if line == ENDED:
                self._whole = True
                continue
            yield line

    def end(self) -> str | None:
        """Have the process end; why it did not do so by itself and whole, or None."""
        if self._silent or not self._whole:
            self._stop()
        code = self._process.wait()
        for reader in self._readers:
            reader.join(5)  # a grandchild may hold the pipe
        if self._silent:
            return "told nothing more and was ended: it hangs"
        if self._whole:
            return None
        return (
            f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with {code}"
        )

    def tail(self) -> tuple[str, ...]:
        """The last lines of stderr."""
        return tuple(self._errors)

    def _stop(self) -> None:
        """End the process if it still runs: one that died, or got Ctrl-C as well, is about to end by itself."""
        for seconds, end in (
            (0.0 if self._silent else LAST_WORDS_S, self._process.terminate),
            (STOP_S, self._process.kill),
        ):
            try:
                self._process.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                end()

    def _read_events(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self._events.put(line.decode().rstrip("\n"))
        self._events.put(None)

    def _read_errors(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                if text := line.decode(errors="backslashreplace").rstrip():
                    self._errors.append(text)


def _opened(pipe: IO[bytes] | None) -> IO[bytes]:
    if pipe is None:
        raise ValueError("the process was started without a pipe")
    return pipe


def cpu_only(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environ` for sections on a machine whose GPU does not answer."""
    return {**environ, "VLLM_MLX_DEVICE": "cpu"}
