"""The terminal shows phases; whatever else writes to stdout or stderr, of any process, lands in the log."""

import subprocess
import sys
from pathlib import Path

import pytest

from pomarium.cluster.cli.progress import log_file


def script(log: Path, body: str) -> "subprocess.CompletedProcess[str]":
    code = f"""
import os, subprocess, sys
from pathlib import Path
from pomarium.cluster.cli.progress import quiet
print("before", flush=True)
with quiet(Path({str(log)!r})) as terminal:
    {body}
print("after")
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_noise_goes_to_the_log_and_phases_to_the_terminal(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "x.log"
    body = """
    with terminal.phase("model"):
        print("python noise")
        print("error noise", file=sys.stderr)
        os.write(1, b"raw noise\\n")
        subprocess.run([sys.executable, "-c", "print('child noise')"], check=True)
    terminal.say("hello")
"""
    done = script(log, body.strip())
    lines = done.stdout.splitlines()
    assert lines[0] == "before"
    assert lines[1].split()[0] == "model"
    assert lines[1].endswith(" s")
    assert lines[2:] == ["hello", "after"]
    assert done.stderr == ""
    assert sorted(log.read_text().split("\n")) == ["", "child noise", "error noise", "python noise", "raw noise"]
    assert log.stat().st_mode & 0o077 == 0


def test_a_name_that_is_no_text_is_shown_escaped(tmp_path: Path) -> None:
    done = script(tmp_path / "x.log", r'terminal.say("caf\xe9 \udcff \ud83d")')
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == "caf\xe9 \\udcff \\ud83d"


def test_a_failed_phase_claims_no_time(tmp_path: Path) -> None:
    body = """
    with terminal.phase("engine"):
        raise SystemExit(3)
"""
    done = script(tmp_path / "x.log", body.strip())
    assert (done.returncode, done.stdout) == (3, "before\n")


@pytest.mark.parametrize("state", ["/state", None])
def test_log_files_lie_where_state_belongs(state: str | None) -> None:
    environ = {} if state is None else {"XDG_STATE_HOME": state}
    parent = log_file("serve", environ).parent
    assert parent == Path(state or Path.home() / ".local" / "state") / "pomarium"
