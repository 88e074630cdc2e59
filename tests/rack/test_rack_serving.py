"""A rack of three simulated Macs serves a model in two stages: the same text as one machine, and what befalls the Macs
ends requests in time, is said, and heals by itself. Everything is real but the Macs: raylets, workers, links, kills.

The tests run in order on one rack and one server.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from chromium import browser
from openai import APIError
from rack_serving import HEAL_S, Rack, answer, served_again, serving

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FAULT_S = 10.0
"""Requests in flight end with an error so soon after any fault."""
LAYERS = 30
DISK_BYTES = 1 << 30
WATCHED_S = 20.0
PAGE_S = 90.0


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A file system of its own for what Ray and the server write: it can be filled."""
    folder = Path(tempfile.mkdtemp(prefix="pmd", dir="/tmp"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    try:
        yield folder
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        folder.rmdir()


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory, disk: Path) -> Iterator[Rack]:
    folder = disk / "state"
    folder.mkdir()
    config = tmp_path_factory.mktemp("config")
    options = ["--stages", "2", "--failovers", "0"]  # answers that go on: test_rack_failover.py
    with serving(folder, config, ["--simulate", "3"], options, RAY_TMPDIR=str(disk)) as rack:
        yield rack
    shutil.rmtree(folder)
    assert list(disk.iterdir()) == [], "the rack left files"


class Streaming:
    """A long request that runs while something happens."""

    def __init__(self, rack: Rack, tokens: int = 900) -> None:
        self._rack, self._tokens = rack, tokens
        self.pieces = 0
        """As they come: tokens that wait together are one."""
        self.answered = 0
        self.error: Exception | None = None
        self.ended: float | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        rack.until(lambda: self.pieces or self.error, 60)

    def _run(self) -> None:
        try:
            stream = self._rack.client().completions.create(
                model="smollm2",
                prompt="Once upon a time",
                max_tokens=self._tokens,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            for piece in stream:
                self.pieces += 1
                self.answered = piece.usage.completion_tokens if piece.usage is not None else 0
        except (APIError, httpx.HTTPError) as error:
            self.error = error
        self.ended = time.monotonic()

    def finishes(self) -> None:
        self._thread.join(200)
        assert self.ended is not None, "the request hangs"
        assert self.error is None
        assert self.answered == self._tokens

    def ends_within(self, seconds: float, since: float) -> None:
        self._thread.join(seconds + 20)
        assert self.ended is not None, "the request hangs"
        assert self.error is not None, "the request ended as if nothing had happened"
        assert self.ended - since < seconds


def test_same_text_as_from_one_machine_and_status_shows_the_layers(rack: Rack) -> None:
    assert answer(rack) == "The capital of France is Paris."
    stages = rack.stages()
    assert [(stages[0]["first"], stages[-1]["end"]), stages[0]["end"]] == [(0, LAYERS), stages[1]["first"]]
    status = rack.status()
    assert len(status["macs"]) == 3
    assert {stage["mac"] for stage in stages} < {mac["name"] for mac in status["macs"]}
    assert len({stage["mac"] for stage in stages}) == 2, "two stages of one replica share a Mac"
    for mac in status["macs"]:
        held = [(stage["first"], stage["end"]) for stage in mac["stages"]]
        assert held == [(s["first"], s["end"]) for s in stages if s["mac"] == mac["name"]]


def test_the_page_reads_what_rack_status_prints(rack: Rack) -> None:
    told, printed = httpx.get(f"{rack.server.url}/v1/rack", timeout=60).json(), rack.status()
    assert told.pop("models") == [{"name": "smollm2", "state": "serving", "reason": None}]
    assert told.keys() == printed.keys()
    for field in ("address", "simulated", "version", "macs", "waiting", "missing", "disk"):
        assert told[field] == printed[field]
    assert [replica["stages"] for replica in told["replicas"]] == [replica["stages"] for replica in printed["replicas"]]
    assert printed["at"] > 0


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while file.write(bytes(1 << 20)):
            pass


def status_code(rack: Rack) -> int:
    """Exit code of `rack status`."""
    line = [sys.executable, "-m", "pomarium.cluster.cli.main", "rack", "status"]
    return subprocess.run(line, env=rack.environ, capture_output=True, timeout=60, check=False).returncode


def test_status_tells_of_dead_ingresses(rack: Rack) -> None:
    """With Serve's controller frozen nobody starts another meanwhile."""
    assert status_code(rack) == 0
    (controller,), ingresses = (rack.processes(name) for name in ("ServeController", "pomarium:ingress"))
    assert len(ingresses) == 2
    controller.send_signal(signal.SIGSTOP)
    try:
        for ingress in ingresses:
            ingress.kill()
        (missing,) = rack.until(lambda: rack.status()["missing"], 10)
        assert missing["what"] == "the ingress"
        assert any(f"pid {ingress.pid}" in missing["why"] for ingress in ingresses)
        assert status_code(rack) == 1
    finally:
        controller.send_signal(signal.SIGCONT)
    served_again(rack)
    rack.until(lambda: status_code(rack) == 0, 30)


def test_a_full_disk(rack: Rack, disk: Path) -> None:
    """What cannot be logged is not logged: requests are served, one that runs meanwhile among them. What is lost then
    starts again once there is room, and until then the disk is named and the attempts are few."""
    if not os.path.ismount(disk):
        pytest.skip("a file system of its own for this test takes root")
    streaming = Streaming(rack, 400)
    ballast = disk / "ballast"
    named = f"The disk of {disk}"
    try:
        with pytest.raises(OSError, match="No space left"):
            fill(ballast)
        assert shutil.disk_usage(disk).free < 1 << 20
        assert answer(rack) == "The capital of France is Paris."
        before = streaming.pieces
        rack.until(lambda: streaming.pieces > before or streaming.ended, 20)
        status, said = rack.health()
        assert status == 200
        assert json.loads(said)["disk"].startswith(named)
        assert rack.status()["disk"].startswith(named)
        streaming.finishes()
        victim, streaming = rack.stages()[0]["pid"], Streaming(rack)
        psutil.Process(victim).kill()
        killed = time.monotonic()
        streaming.ends_within(FAULT_S, killed)
        _, said = rack.until(lambda: (now := rack.health())[0] == 503 and now, FAULT_S)
        assert json.loads(said)["models"]["smollm2"] != "ok"
        rack.until(lambda: rack.status()["replicas"] == [], FAULT_S)
        assert json.loads(rack.health()[1])["disk"].startswith(named)
        tried, until = set(), time.monotonic() + WATCHED_S
        while time.monotonic() < until:
            tried |= set(re.findall(r"pid \d+", rack.health()[1]))
            time.sleep(0.2)
        assert len(tried) <= 8, "a start fails within a second or two, and there are 2, 4, 8, 16 s between them"
    finally:
        ballast.unlink()
    served_again(rack)
    assert victim not in [stage["pid"] for stage in rack.stages()]
    # The terminal's lines go to a file on that disk: they are written once there is room.
    rack.until(lambda: "ready again" in rack.server.output, 30)
    assert named in rack.server.output


def test_a_frozen_mac_is_left_and_comes_back_once(rack: Rack) -> None:
    """SIGSTOP of all its processes: no connection breaks, as when power or cable is lost."""
    served_again(rack)
    victim, streaming = rack.stages()[1]["mac"], Streaming(rack)
    rack.simulated.freeze(victim)
    frozen = time.monotonic()
    streaming.ends_within(FAULT_S, frozen)
    served_again(rack)
    assert victim not in [stage["mac"] for stage in rack.stages()]
    rack.simulated.kill(victim)
    rack.simulated.rejoin(victim)
    rack.until(lambda: sum(mac["alive"] for mac in rack.status()["macs"]) == 3, 60)
    assert [mac["name"] for mac in rack.status()["macs"] if mac["alive"]].count(victim) == 1


def test_a_killed_mac_is_replaced(rack: Rack) -> None:
    served_again(rack)
    victim, streaming = rack.stages()[0]["mac"], Streaming(rack)
    rack.simulated.kill(victim)
    streaming.ends_within(FAULT_S, time.monotonic())
    served_again(rack)
    assert victim not in [stage["mac"] for stage in rack.stages()]


def test_too_few_macs_are_left(rack: Rack) -> None:
    rack.simulated.kill(rack.stages()[0]["mac"])
    rack.until(lambda: "2 stages need 2 Macs" in rack.health()[1], HEAL_S)
    assert "2 stages need 2 Macs" in rack.status()["waiting"][0]["reason"]


def test_a_mac_of_another_version_does_not_help(rack: Rack) -> None:
    lost = next(mac["name"] for mac in rack.status()["macs"] if not mac["alive"])
    rack.simulated.rejoin(lost, version="9.9.9-py3.11")
    rack.until(lambda: f"{lost} runs 9.9.9-py3.11" in rack.health()[1], HEAL_S)
    rack.simulated.kill(lost)
    rack.until(lambda: lost not in [mac["name"] for mac in rack.status()["macs"] if mac["alive"]], 30)


def test_a_mac_that_comes_back_is_used(rack: Rack) -> None:
    rack.simulated.rejoin(next(mac["name"] for mac in rack.status()["macs"] if not mac["alive"]))
    served_again(rack)
    assert rack.status()["waiting"] == []


def test_the_page_shows_macs_that_are_killed(rack: Rack) -> None:
    """Open in a browser while it happens. The last test: nobody heals the rack."""
    served_again(rack)
    first, *others = [stage["mac"] for stage in rack.stages()]
    spare = [mac["name"] for mac in rack.status()["macs"] if mac["alive"] and mac["name"] not in (first, *others)]
    with browser() as opened, opened.opened(rack.server.url) as tab:
        of_first = f"[...document.querySelectorAll('.mac')].find((one) => one.innerText.includes({first!r})).innerText"
        of_model = "document.querySelector('.model').innerText"
        tab.until(f"document.querySelectorAll('.mac').length === 3 && {of_first}.includes('alive')", PAGE_S)
        tab.until(f"{of_model}.includes('serving')", PAGE_S)
        rack.simulated.kill(first)
        tab.until(f"{of_first}.includes('lost')", PAGE_S)
        tab.until(f"!{of_model}.includes('serving')", PAGE_S)
        for mac in spare:  # so that one is left
            rack.simulated.kill(mac)
        tab.until(f"{of_model}.includes('waiting') && {of_model}.includes('2 stages need 2 Macs')", HEAL_S)
        assert tab.faults == []
