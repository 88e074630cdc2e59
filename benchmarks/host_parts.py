"""Where a step's processor time goes: by part on the thread that runs it, and by thread in its process.

    Parts.of(part, function) --called--> nanoseconds of the thread, charged to the innermost part
    thread_seconds() --before, after--> what each thread of this process has used

Time spent waiting is no processor time, so other programs on the machine hardly change it.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import psutil

P = ParamSpec("P")
R = TypeVar("R")


class Parts:
    """Processor time of one thread by part, in ns. What one part calls of another is the other's alone."""

    def __init__(self) -> None:
        self.ns: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0

    def of(self, part: str, function: Callable[P, R]) -> Callable[P, R]:
        """`function`, its time charged to `part`."""

        @functools.wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            self._charge()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._charge()
                self._open.pop()

        return timed

    def _charge(self) -> None:
        now = time.thread_time_ns()
        if self._open:
            self.ns[self._open[-1]] += now - self._since
        self._since = now


def thread_seconds() -> dict[int, float]:
    """Processor time of each thread of this process, by its native id."""
    found = {}
    for thread in psutil.Process().threads():
        # psutil reads hundredths of a second on Linux; the first word of schedstat is in nanoseconds.
        precise = Path(f"/proc/self/task/{thread.id}/schedstat")
        try:
            found[thread.id] = int(precise.read_text().split()[0]) / 1e9
        except FileNotFoundError:
            found[thread.id] = thread.user_time + thread.system_time
    return found


def used(before: dict[int, float], after: dict[int, float], without: frozenset[int]) -> float:
    """Seconds that threads other than `without` used in between."""
    return sum(seconds - before.get(thread, 0.0) for thread, seconds in after.items() if thread not in without)
