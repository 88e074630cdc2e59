"""A start that is told to end, at any moment: it says so at once, and leaves no process and no folder."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serve_process import READY_S, STOP_S, Server

from pomarium.cluster.node import ports
from pomarium.cluster.node.ray_folder import RAY_FOLDER

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SAID_S = 3.0
"""A start that is interrupted within a call of Ray's said nothing for 6 to 15 s."""


@pytest.fixture
def starting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="pmi", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        server = Server(tmp_path)
        server.start(["--port", str(ports.free(1)[0]), "--max-model-len", "512"])
        try:
            yield server
        finally:
            server.kill()


@pytest.mark.parametrize(
    ("line", "signal_number"),
    [
        ("log ", signal.SIGTERM),
        pytest.param("ray folder", signal.SIGTERM, marks=pytest.mark.full),
        pytest.param("ray node", signal.SIGTERM, marks=pytest.mark.full),
        ("ray ", signal.SIGINT),
        ("model ", signal.SIGTERM),
    ],
)
def test_it_says_so_at_once_and_leaves_nothing(starting: Server, line: str, signal_number: signal.Signals) -> None:
    process, folder = starting.process, Path(os.environ["RAY_TMPDIR"])
    assert process is not None

    def reached() -> bool:
        match line:
            case "ray folder":
                return any(folder.iterdir())
            case "ray node":
                return any("raylet" in path.name for path in folder.glob(f"pm-*/{RAY_FOLDER}/session_2*/logs/*"))
        return f"\n{line}" in f"\n{starting.output}"

    deadline = time.monotonic() + READY_S
    while not reached():
        assert process.poll() is None, starting.output
        assert time.monotonic() < deadline, starting.output
        time.sleep(0.02)
    process.send_signal(signal_number)
    told = time.monotonic()
    while "stopping ..." not in starting.output:
        assert time.monotonic() - told < SAID_S, starting.output
        time.sleep(0.02)
    assert process.wait(STOP_S) == 130, starting.output + starting.log()
    assert [p.cmdline() for p in starting.processes()] == []
    assert list(folder.iterdir()) == []
    assert starting.output.count("stopping ...") == 1
    assert "Traceback" not in starting.output
