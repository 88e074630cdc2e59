"""Leftover processes are found by their marker, whoever their parent is, and ended even if they resist."""

import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pomarium.cluster.endpoint import local_ray
from pomarium.cluster.node import kin, ray_folder
from pomarium.worker.errors import SettingsError

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def test_marked_processes_are_ended_and_no_others(tmp_path: Path) -> None:
    one, two = (local_ray.LocalRay(session, tmp_path).kin for session in ("s1", "s2"))
    marked = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env={local_ray.MARKER: "s1"}, stdout=subprocess.PIPE, text=True
    )
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={local_ray.MARKER: "s2"})
    try:
        assert marked.stdout is not None
        assert marked.stdout.readline() == "up\n"
        deadline = time.monotonic() + 5
        while [p.pid for p in kin.members(two)] != [other.pid] and time.monotonic() < deadline:
            time.sleep(0.01)
        assert [p.pid for p in kin.members(one)] == [marked.pid]
        kin.end_all([one], 0.3)
        assert marked.poll() is not None
        assert kin.members(one) == []
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()
        if marked.stdout is not None:
            marked.stdout.close()


def test_a_long_temporary_folder_is_refused_before_ray_stumbles_over_it(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    with pytest.raises(SettingsError, match=r"RAY_TMPDIR.*too long"):
        ray_folder.new_session_folder({"RAY_TMPDIR": str(long)})
    assert list(long.iterdir()) == []


def test_a_session_folder_is_new_each_time(tmp_path: Path) -> None:
    short = Path("/tmp")
    first, second = (ray_folder.new_session_folder({"RAY_TMPDIR": str(short)}) for _ in range(2))
    try:
        assert first != second
        assert stat.S_IMODE(first.stat().st_mode) == 0o700, "Ray opens what it makes in it to every user"
        assert len(str(first / ray_folder.RAY_FOLDER)) + ray_folder.RAY_SOCKET_SUFFIX <= ray_folder.SOCKET_PATH_LIMIT
    finally:
        first.rmdir()
        second.rmdir()


def test_authentication_is_explicit_and_each_token_new() -> None:
    first, second = (local_ray.environment(s) for s in "ab")
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
