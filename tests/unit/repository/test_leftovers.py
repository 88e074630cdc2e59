"""A run of the tests that is told to end, or killed, while a fixture starts something (leftovers.py)."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parents[2]
LEFT = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
START = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {LEFT!r}], start_new_session=True)"
INTERRUPTED = f"""
import subprocess, sys, time
import pytest

@pytest.fixture
def started():
    subprocess.run([sys.executable, "-c", {START!r}], check=True)
    time.sleep(600)

def test_what_it_is_for(started):
    pass
"""
SECONDS = 60


def run(folder: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pytest", "-q", "-p", "leftovers", "-p", "no:cacheprovider", str(folder)]
    environ = os.environ | {"PYTHONPATH": str(TESTS), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.Popen(command, cwd=folder, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@contextmanager
def within_a_fixture(folder: Path) -> Iterator[tuple["subprocess.Popen[bytes]", psutil.Process]]:
    """A run whose fixture has started a process that nobody else knows, and has not come back."""
    folder.mkdir()
    (folder / "test_it.py").write_text(INTERRUPTED)
    with run(folder) as pytest_run:
        file, deadline = folder / "pid", time.monotonic() + SECONDS
        while not (file.exists() and file.read_text()):
            assert time.monotonic() < deadline
            assert pytest_run.poll() is None
            time.sleep(0.05)
        left = psutil.Process(int(file.read_text()))
        try:
            yield pytest_run, left
        finally:
            with suppress(psutil.NoSuchProcess):
                left.kill()
            pytest_run.kill()


def lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("told", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_told_to_end_leaves_nothing(tmp_path: Path, told: signal.Signals) -> None:
    with within_a_fixture(tmp_path / "run") as (pytest_run, left):
        pytest_run.send_signal(told)
        output = pytest_run.communicate(timeout=SECONDS)[0].decode()
        assert pytest_run.returncode == pytest.ExitCode.INTERRUPTED, output
        assert not lives(left)
        assert "ended what this run had left: " in output
        assert str(left.pid) in output


def test_what_a_killed_run_leaves_the_next_one_ends_and_nothing_of_a_run_that_goes_on(tmp_path: Path) -> None:
    with within_a_fixture(tmp_path / "killed") as (killed, left), within_a_fixture(tmp_path / "going") as (going, kept):
        killed.kill()
        killed.wait(SECONDS)
        assert lives(left)
        (tmp_path / "next").mkdir()
        (tmp_path / "next/test_it.py").write_text("def test_nothing():\n    pass\n")
        with run(tmp_path / "next") as after:
            output = after.communicate(timeout=SECONDS)[0].decode()
        assert after.returncode == 0, output
        assert "ended what a killed run had left: " in output
        assert str(left.pid) in output
        assert not lives(left)
        assert going.poll() is None
        assert lives(kept)
