"""Leftover processes are found by their marker, whoever their parent is, and ended even if they resist."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from pomarium.cluster.serving import local_ray
from pomarium.worker.errors import SettingsError

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


def test_a_marked_process_is_found_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_ray, "TERM_S", 0.3)
    marked = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], env={local_ray.MARKER: "s1"}, stdout=subprocess.PIPE, text=True
    )
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env={local_ray.MARKER: "s2"})
    try:
        assert marked.stdout is not None
        assert marked.stdout.readline() == "up\n"
        deadline = time.monotonic() + 5
        while [p.pid for p in local_ray.leftovers("s2")] != [other.pid] and time.monotonic() < deadline:
            time.sleep(0.01)
        found = list(local_ray.leftovers("s1"))
        assert [p.pid for p in found] == [marked.pid]
        local_ray.end(found)
        assert not found[0].is_running()
        assert list(local_ray.leftovers("s1")) == []
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
        local_ray.session_folder({"RAY_TMPDIR": str(long)})
    assert list(long.iterdir()) == []


def test_a_session_folder_is_new_each_time(tmp_path: Path) -> None:
    short = Path("/tmp")
    first, second = (local_ray.session_folder({"RAY_TMPDIR": str(short)}) for _ in range(2))
    try:
        assert first != second
        assert len(str(first)) + local_ray.RAY_SOCKET_SUFFIX <= local_ray.SOCKET_PATH_LIMIT
    finally:
        first.rmdir()
        second.rmdir()


def test_authentication_is_explicit_and_each_token_new() -> None:
    first, second = (local_ray.environment(s) for s in "ab")
    assert first["RAY_AUTH_MODE"] == "token"
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
