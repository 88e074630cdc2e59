"""How a Mac is put to sleep, and out of a dark wake: with stand-ins that print and end as macOS's commands do."""

import subprocess
import threading
import time
from pathlib import Path

import pytest

from pomarium.cluster.autoscaling import sleep
from pomarium.cluster.autoscaling.sleep import SleepRefusedError
from pomarium.worker.errors import SettingsError

REFUSAL = "Sleep error 0xe00002c1; You must run this as root."
"""Of pmset.c, with kIOReturnNotPrivileged; on standard output, exit status EX_NOPERM, 77."""
SUDO = "sudo: a password is required"


def command(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def refusing(tmp_path: Path) -> tuple[sleep.Way, ...]:
    pmset = command(tmp_path / "pmset", f"echo '{REFUSAL}'; exit 77")
    sudo = command(tmp_path / "sudo", f"echo '{SUDO}' >&2; exit 1")
    return ((sudo, "-n", pmset, "sleepnow"), (pmset, "sleepnow"))


class Clocks:
    """Of a machine that sleeps an hour when `asleep_at` seconds have passed; None: it does not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, asleep_at: float | None) -> None:
        self.wall, self.steady, self.asleep_at = 1000.0, 50.0, asleep_at
        monkeypatch.setattr(sleep.time, "time", lambda: self.wall)
        monkeypatch.setattr(sleep.time, "monotonic", lambda: self.steady)

    def pause(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds
        if self.asleep_at is not None and self.steady > 50 + self.asleep_at:
            self.wall += 3600


def test_a_sleep_shows_in_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks, ran = Clocks(monkeypatch, asleep_at=3), list[sleep.Way]()
    assert sleep.nap(sleep.MAC_WAYS, clocks.pause, ran.append)
    assert ran == [("sudo", "-n", "/usr/bin/pmset", "sleepnow")]
    assert clocks.steady < 60


def test_a_machine_that_does_not_sleep_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch, asleep_at=None)
    assert not sleep.nap(sleep.MAC_WAYS, clocks.pause, lambda way: None)
    assert clocks.steady == 50 + sleep.NAP_S


def test_who_sits_at_the_screen_needs_no_sudo(refusing: tuple[sleep.Way, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = Clocks(monkeypatch, asleep_at=1)
    assert sleep.nap((refusing[0], ("true",)), clocks.pause)


def test_a_refusal_is_told_at_once_with_all_that_was_printed(refusing: tuple[sleep.Way, ...]) -> None:
    def pause(seconds: float) -> None:
        raise AssertionError("it waits for a sleep that does not come")

    with pytest.raises(SleepRefusedError) as refusal:
        sleep.nap(refusing, pause)
    said = str(refusal.value)
    assert f"ended with 1: {SUDO};" in said
    assert f"ended with 77: {REFUSAL.rstrip('.')})" in said
    assert "deploy/install.sh" in said


def test_any_status_but_zero_is_a_refusal(tmp_path: Path) -> None:
    quiet = command(tmp_path / "quiet", "exit 3")
    assert sleep.run((quiet,)) == f"`{quiet}` ended with 3: it says nothing"
    assert sleep.run(("true",)) is None
    absent = sleep.run((str(tmp_path / "absent"),))
    assert absent is not None
    assert "No such file" in absent


def test_what_puts_a_machine_to_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sleep.ways("darwin") == (("sudo", "-n", "/usr/bin/pmset", "sleepnow"), ("/usr/bin/pmset", "sleepnow"))
    monkeypatch.setattr(sleep.shutil, "which", lambda name: None)
    with pytest.raises(SettingsError, match="idle"):
        sleep.ways("linux")


def test_a_dark_wake_is_made_a_full_one_without_waiting_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, told = list[str](), tmp_path / "told"
    caffeinate = command(tmp_path / "caffeinate", f'echo "$@" >{told}')
    monkeypatch.setattr(sleep, "ROUSE", sleep.ROUSE.replace(sleep.CAFFEINATE, caffeinate))
    sleep.rouse(said.append, "linux")
    assert not told.exists()
    sleep.rouse(said.append, "darwin")
    for thread in (thread for thread in threading.enumerate() if thread.name == "rouse"):
        thread.join(30)
    assert told.read_text() == "-u -t 30\n"
    assert said == []
    monkeypatch.setattr(sleep, "ROUSE", str(tmp_path / "absent"))
    sleep.rouse(said.append, "darwin")
    deadline = time.monotonic() + 30
    while not said and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "may fall asleep again" in said[0]


def test_the_line_for_sudo_is_the_command_that_is_run() -> None:
    install = Path(__file__).parents[3] / "deploy/install.sh"
    shown = subprocess.run(["grep", "-c", " ".join(sleep.MAC_WAYS[0][2:]), install], capture_output=True, check=False)
    assert shown.returncode == 0
