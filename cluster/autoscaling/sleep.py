"""How this machine is put to sleep, how it is seen that it slept, and what keeps it awake once it was woken.

    ways() --nap--> the first that is not refused --> asleep ... awake
                    all refused: SleepRefusedError at once, with what each one printed

`pmset sleepnow` is for root and for who sits at the screen; to anybody else it prints its refusal on standard output
and exits with 77 (EX_NOPERM; Apple's PowerManagement, pmset.c). An agent is a job of launchd and neither, so sudo comes
first: install.sh lets its user run that one command.

A packet of the network wakes a Mac into a dark wake, from which it falls asleep again by itself: `caffeinate -i` does
not hold there, and `caffeinate -u`, which declares that somebody uses the Mac, makes it a full one (caffeinate(8)).
"""

import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence

from pomarium.worker.errors import PomariumError, SettingsError

Way = tuple[str, ...]

PMSET, CAFFEINATE = "/usr/bin/pmset", "/usr/bin/caffeinate"
MAC_WAYS: tuple[Way, ...] = (("sudo", "-n", PMSET, "sleepnow"), (PMSET, "sleepnow"))
"""The first word for word as in the line that install.sh writes for sudo; the second for who sits at the screen."""
ROUSE = f"{CAFFEINATE} -u -t 30"
"""For long enough that a job's own `caffeinate -i` holds after it."""
COMMAND_S = 30.0
LOOK_S = 1.0
NAP_S = 300.0
"""A Mac that was told to sleep and does not in this time joins again: it would be lost for the rack."""
JUMP_S = 5.0
"""The clock of the wall runs on while a Mac sleeps and the monotonic one does not: such a difference is a sleep."""


class SleepRefusedError(PomariumError):
    """The machine was not put to sleep; says what was tried and what came of it."""


def ways(platform: str = sys.platform) -> tuple[Way, ...]:
    """What puts this machine to sleep, the likeliest first. Raises SettingsError: nothing is known."""
    if platform == "darwin":
        return MAC_WAYS
    if shutil.which("systemctl"):
        return (("systemctl", "suspend"),)
    raise SettingsError("It is not known how this machine is put to sleep: take `idle` out of rack.yaml's `sleep`.")


def refused(faults: Sequence[str]) -> SleepRefusedError:
    """Of a Mac on which every way failed."""
    return SleepRefusedError(
        f"the Mac cannot be put to sleep ({'; '.join(faults)}): run its `deploy/install.sh` line again, which lets "
        f"this user run `sudo {PMSET} sleepnow`; the Mac stays in the rack"
    )


def run(way: Sequence[str]) -> str | None:
    """Run a command that returns before the machine sleeps. Returns why it failed; None if it did not."""
    try:
        done = subprocess.run(
            way, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{shlex.join(way)}`: {error}"
    if done.returncode == 0:
        return None
    said = " ".join(f"{done.stderr} {done.stdout}".split()).rstrip(".") or "it says nothing"
    return f"`{shlex.join(way)}` ended with {done.returncode}: {said}"


def nap(
    ways: Sequence[Way], pause: Callable[[float], object] = time.sleep, run: Callable[[Way], str | None] = run
) -> bool:
    """Put this machine to sleep and return when it has slept.

    Returns: False if it did not sleep within NAP_S, though it was told to.

    Raises: SleepRefusedError at once.
    """
    ahead = time.time() - time.monotonic()
    faults: list[str] = []
    for way in ways:
        if (fault := run(way)) is None:
            break
        faults.append(fault)
    else:
        raise refused(faults)
    deadline = time.monotonic() + NAP_S
    while time.monotonic() < deadline:
        if time.time() - time.monotonic() - ahead > JUMP_S:
            return True
        pause(LOOK_S)
    return False


def rouse(say: Callable[[str], object], platform: str = sys.platform) -> None:
    """Make a dark wake a full one. Returns at once; tells if that fails. Nothing to do but on macOS."""
    if platform == "darwin":
        threading.Thread(target=_rouse, args=(say,), name="rouse", daemon=True).start()


def _rouse(say: Callable[[str], object]) -> None:
    if fault := run(ROUSE.split()):
        say(f"this Mac may fall asleep again: {fault}")
