"""macOS keeps a program off the local network: what a refused connection says, with real ones that have no route.

The system's EHOSTUNREACH is real, from a network namespace whose routes are `unreachable`; that the system is macOS is
said to the code.
"""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from namespaces import ip, namespace_or_skip

from pomarium.cluster.autoscaling.head_view import HeadView
from pomarium.cluster.node import ray_address
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.rack import this_machine
from pomarium.cluster.rack.identity import RackKey
from pomarium.worker import local_network

CURE = local_network.SETTINGS
NO_ROUTE = OSError(errno.EHOSTUNREACH, "No route to host")


@pytest.fixture
def macos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_network, "on_macos", lambda: True)


@pytest.mark.usefixtures("macos")
@pytest.mark.parametrize(
    ("fault", "address", "named"),
    [
        (NO_ROUTE, "192.168.1.20:6379", True),
        (NO_ROUTE, "10.0.5.1:6379", True),
        (NO_ROUTE, "169.254.3.4:1", True),
        (NO_ROUTE, "studio.local:6379", True),
        (NO_ROUTE, "8.8.8.8:6379", False),
        (NO_ROUTE, "127.0.0.1:6379", False),
        (OSError(errno.ECONNREFUSED, "Connection refused"), "10.0.5.1:6379", False),
        (TimeoutError("timed out"), "10.0.5.1:6379", False),
        ("UNAVAILABLE: connect failed: addr: ipv4:10.0.5.1:7 error: No route to host", "10.0.5.1:7", True),
        ("ssh: connect to host 10.0.5.1 port 22: No route to host", "10.0.5.1:22", True),
        ("UNAVAILABLE: Socket closed", "10.0.5.1:7", False),
    ],
)
def test_the_setting_is_named_where_it_can_be_the_reason(fault: OSError | str, address: str, named: bool) -> None:
    assert (CURE in local_network.advice(fault, address)) is named
    if isinstance(fault, str):
        told = local_network.explained(fault, address)
        assert told.startswith(fault)
        assert (CURE in told) is named


def test_elsewhere_it_is_not_named() -> None:
    assert local_network.advice(NO_ROUTE, "10.0.5.1:6379") == ""


PEER = "10.99.0.1"
PROGRAM = f"""
import json
from pomarium.cluster.node import ray_address
from pomarium.cluster.cli.main import main
from pomarium.cluster.autoscaling import wake_on_lan
from pomarium.cluster.executor.link import WorkerLink
from pomarium.worker import local_network
from pomarium.worker.handoff import probe
from pomarium.worker.handoff.settings import HandoffSettings

local_network.on_macos = lambda: True
told = {{"errno": ray_address.fault("{PEER}:6379").errno}}
try:
    ray_address.require("{PEER}:6379")
except Exception as error:
    told |= {{"ray": str(error), "cause": error.__cause__.errno}}
try:
    probe.probe("{PEER}:7000", "token", None, HandoffSettings(allow_plaintext=True), 0.1)
except Exception as error:
    told["probe"] = str(error)
lost = []
link = WorkerLink("worker 1", "{PEER}:7001", "token", lost.append, None, True)
try:
    link.wait_ready(30)
except Exception as error:
    told["link"] = str(error)
try:
    wake_on_lan.send(wake_on_lan.Target("02:00:00:00:00:01", "{PEER}"), interfaces=[])
except Exception as error:
    told["wake"] = str(error)
print(json.dumps(told), flush=True)
main(["rack", "join", "{PEER}", "--key", KEY, "--address", "127.0.0.2", "--bandwidth", "1GB/s", "--flops", "1TFLOPS"])
"""


@pytest.fixture(scope="module")
def unreachable() -> Iterator[str]:
    with namespace_or_skip("pmlocal") as name:
        for command in ("link set lo up", f"route add unreachable {PEER}/32", "route add unreachable default"):
            ip("-netns", name, *command.split())
        yield name


def test_a_network_without_a_way_is_told_with_its_errno_wherever_it_is_met(unreachable: str, tmp_path: Path) -> None:
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    program = PROGRAM.replace("KEY", repr(RackKey.generate().text))
    done = subprocess.run(
        ["ip", "netns", "exec", unreachable, sys.executable, "-c", program],
        env=environ, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.stdout, done.stderr
    told = json.loads(done.stdout)
    assert told["errno"] == told["cause"] == errno.EHOSTUNREACH
    refused = [line for line in done.stderr.splitlines() if line.startswith("pomarium: ")]
    assert len(refused) == 1, done.stderr
    assert f"No rack answers at {PEER}:6379 (No route to host)" in refused[0]
    for said in (refused[0], told["ray"], told["probe"], told["link"], told["wake"]):
        assert CURE in said
    assert "No route to host" in told["probe"]


@pytest.mark.usefixtures("macos")
def test_a_mac_that_waits_for_its_head_says_why_once_for_each_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = OSError(errno.ECONNREFUSED, "Connection refused")
    faults = [NO_ROUTE, NO_ROUTE, refused, refused, NO_ROUTE, None]
    monkeypatch.setattr(ray_address, "fault", lambda address: faults.pop(0))
    monkeypatch.setattr(this_machine, "PAUSE_S", 0.0)
    said: list[str] = []
    this_machine._await_head("10.0.5.1:6379", said.append)
    assert len(said) == 3
    assert CURE in said[0]
    assert said[0] == said[2]
    assert said[1] == "waiting for the rack at 10.0.5.1:6379: Connection refused"


@pytest.mark.usefixtures("macos")
def test_an_agent_tells_why_the_head_is_away_and_again_when_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [None, NO_ROUTE, NO_ROUTE, None, NO_ROUTE]
    monkeypatch.setattr(ray_address, "fault", lambda address: faults.pop(0))
    said: list[str] = []
    head = HeadView(Membership("s", "10.0.5.1:6379", "token"), said.append)
    assert [head.answers() for _ in range(5)] == [True, False, False, True, False]
    assert len(said) == 2
    assert all("No route to host" in line and CURE in line for line in said)
