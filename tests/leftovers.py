"""What a run of the tests has started ends with it; what a run left that was killed ends as the next one begins.

    pytest_configure --RUN=pid:start--> environment of all that this run starts --its mark--> what is ended

A process is known by that variable alone, and only marks of this run and of runs that are over count: several checkouts
test at once on one machine. SIGTERM ends a run as Ctrl-C does, fixtures and all.
"""

import os
import signal
import sys
from collections.abc import Callable

import psutil

RUN = "PYTEST_RUN_OF_POMARIUM"
ROUNDS, ROUND_S = 5, 3.0
"""Some processes start others while they are ended."""


def mark_of(process: psutil.Process) -> str:
    """Of the run whose pytest this is."""
    return f"{process.pid}:{process.create_time():.0f}"


def over(mark: str) -> bool:
    """Whether the run with this mark has ended."""
    pid, _, start = mark.partition(":")
    try:
        process = psutil.Process(int(pid))
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - float(start)) > 1.5
    except (psutil.NoSuchProcess, ValueError):
        return True


def marked(counts: Callable[[str], bool]) -> list[psutil.Process]:
    """Processes with a mark that counts, but for those that Python keeps beside a process and that end with it."""
    found = []
    for process in psutil.process_iter():
        try:
            mark = process.environ().get(RUN)
            if mark is None or not counts(mark) or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid != os.getpid() and "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def end(counts: Callable[[str], bool]) -> list[str]:
    """Kill what `marked` finds, until there is none; the names of what was killed."""
    names = []
    for _ in range(ROUNDS):
        if not (left := marked(counts)):
            break
        for process in left:
            try:
                names.append(f"{process.name()} {process.pid}")
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=ROUND_S)
    return names


def _interrupted(signum: int, frame: object) -> None:
    # A second one would cut the end of fixtures short; Ctrl-C still does.
    signal.signal(signal.SIGTERM, lambda signum, frame: None)
    raise KeyboardInterrupt


def pytest_configure() -> None:
    # A shell's background job begins with SIGINT ignored, and so would all that it starts.
    signal.signal(signal.SIGINT, _interrupted)
    signal.signal(signal.SIGTERM, _interrupted)
    if names := end(over):
        print(f"[tests] ended what a killed run had left: {', '.join(names)}", file=sys.stderr)
    os.environ[RUN] = mark_of(psutil.Process())


def pytest_unconfigure() -> None:
    mine = mark_of(psutil.Process())
    if names := end(lambda mark: mark == mine):
        print(f"[tests] ended what this run had left: {', '.join(names)}", file=sys.stderr)
