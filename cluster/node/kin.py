"""All processes of a node, whoever their parents are by now: found, signalled and ended together.

Two signs, for neither is on all of them: a marker that they inherit in their environment (some of Ray's agents write
their title over theirs), and the Unix session that their first process opened (a process may open another).
"""

import os
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from pomarium.worker.errors import PomariumError

FILE_NAME = "first-process"
BOOT_TOLERANCE_S = 60.0
"""Clocks are set right after a start of the machine; a restart takes longer than that."""
KILL_S = 10.0


class StillThereError(PomariumError):
    """Processes do not end."""


@dataclass(frozen=True)
class Kin:
    """How the processes of one node are found. `folder`: where `record` wrote their session."""

    variable: str
    value: str
    folder: Path


def record(folder: Path, first: int) -> None:
    """Remember the process that opened a session of its own, `first`, as that of the node."""
    (folder / FILE_NAME).write_text(f"{first} {psutil.boot_time():.0f}")


def members(kin: Kin) -> list[psutil.Process]:
    """The node's processes other than this one and those that have ended."""
    session = _session(kin)
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is(process, kin, session)]


def names(kin: Kin) -> list[str]:
    """What the processes are called."""
    found = []
    for process in members(kin):
        try:
            found.append(str(process.name()))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # gone
    return found


def send(kin: Kin, signal_number: int) -> None:
    """A signal to every process, those too that come up meanwhile."""
    reached: set[int] = set()
    while fresh := [process for process in members(kin) if process.pid not in reached]:
        for process in fresh:
            reached.add(process.pid)
            _signal(process, signal_number)


def kill(kin: Kin) -> None:
    """SIGKILL to every process; returns when they are gone. Raises StillThereError."""
    end_all([kin], 0.0)


def end_all(kins: Sequence[Kin], grace_s: float) -> None:
    """SIGTERM, and after `grace_s` SIGKILL to those that stay, of all nodes at once. Raises StillThereError."""
    deadline = time.monotonic() + grace_s + 3 * KILL_S
    while left := [process for kin in kins for process in members(kin)]:
        if time.monotonic() > deadline:
            raise StillThereError(f"Processes of the rack do not end: {', '.join(str(p.pid) for p in left)}.")
        if grace_s:
            _each(left, signal.SIGTERM)
            _, left = psutil.wait_procs(left, timeout=grace_s)
        _each(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=KILL_S)


def _each(processes: Iterable[psutil.Process], signal_number: int) -> None:
    for process in processes:
        _signal(process, signal_number)


def _signal(process: psutil.Process, signal_number: int) -> None:
    try:
        process.send_signal(signal_number)
    except psutil.NoSuchProcess:
        return


def _session(kin: Kin) -> int | None:
    """Unix session of the node's first process; None if the machine was restarted since, or another process has it."""
    try:
        first, booted = (kin.folder / FILE_NAME).read_text().split()
    except FileNotFoundError:
        return None
    if abs(float(booted) - psutil.boot_time()) > BOOT_TOLERANCE_S:
        return None
    # The number is given to another process only when the session is empty.
    return int(first) if _is_ours_or_gone(int(first), kin) else None


def _is_ours_or_gone(pid: int, kin: Kin) -> bool:
    try:
        return _marked(psutil.Process(pid), kin)
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False


def _is(process: psutil.Process, kin: Kin, session: int | None) -> bool:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return (session is not None and os.getsid(process.pid) == session) or _marked(process, kin)
    except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError):
        return False  # gone, or another user's


def _marked(process: psutil.Process, kin: Kin) -> bool:
    return bool(process.environ().get(kin.variable) == kin.value)
