"""A rack whose Macs sleep: Ray's own autoscaler, magic packets, agents and raylets, all real; only the Macs are not.

What asks for Macs here is a placement group, as an engine's (executor/bundles.py). The tests run in order on one rack.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pomarium.cluster.autoscaling.setup import for_simulated
from pomarium.cluster.autoscaling.wake_on_lan import Target, send
from pomarium.cluster.node import kin, ray_node, starting
from pomarium.cluster.rack import simulate
from pomarium.cluster.rack.current import RECORD
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.rack.mac_power import MacPower, Power, decode
from pomarium.cluster.rack.simulate import SimulatedRack, Simulation, hardware_address

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

IDLE_S, WAKE_S = 6.0, 20.0

DEMAND = """
import sys, time, ray
from ray.util.placement_group import placement_group, placement_group_table
ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
names, hold_s = sys.argv[1].split(","), float(sys.argv[2])
group = placement_group([{"mlx": 1}] * len(names), bundle_label_selector=[{"pomarium.mac/name": n} for n in names])
print("placed" if group.wait(120) else "not placed", flush=True)
time.sleep(hold_s)
"""

WATCH = """
import sys, time
from ray._raylet import GcsClient
from pomarium.cluster.rack import reports
from ray.experimental import internal_kv
client = GcsClient(address=sys.argv[1])
reports.use(client)
while True:
    keys = internal_kv._internal_kv_list(b"mac:", namespace=reports.NAMESPACE)
    for key in keys:
        print(internal_kv._internal_kv_get(key, namespace=reports.NAMESPACE).decode(), flush=True)
    print("", flush=True)
    time.sleep(0.5)
"""

AGENT = """
import os, sys
from pathlib import Path
from pomarium.cluster.autoscaling import sleep
from pomarium.cluster.autoscaling.agent import Agent
from pomarium.cluster.rack import current
record, name, sudo, pmset = sys.argv[1:]
rack = current.read(Path(record))
os.environ.update(rack.membership.variables())
from pomarium.cluster.autoscaling.head_view import HeadView
def say(line): print(line, flush=True)
spec = next(spec for spec in rack.nodes if spec.name == name)
ways = ((sudo, "-n", pmset, "sleepnow"), (pmset, "sleepnow"))
Agent(spec, rack.membership, HeadView(rack.membership, say), os.environ, lambda: sleep.nap(ways), say).run()
"""


class Sleeping:
    """The rack, and what its autoscaler tells of the Macs, read by a process of its own."""

    def __init__(self, rack: SimulatedRack, folder: Path) -> None:
        self.rack, self._told = rack, folder / "told"
        self.environ = os.environ | rack.environment()
        self.watch()

    def watch(self) -> None:
        with self._told.open("wb") as told:
            self._watch = subprocess.Popen(
                [sys.executable, "-c", WATCH, self.rack.current.address], env=self.environ, stdout=told, stderr=told
            )

    def close(self) -> None:
        self._watch.kill()
        self._watch.wait()

    def states(self) -> dict[str, MacPower]:
        """As told last."""
        blocks = self._told.read_text().split("\n\n")[:-1]
        return {} if not blocks else {(mac := decode(line.encode())).name: mac for line in blocks[-1].splitlines()}

    def state(self, name: str) -> str:
        return str(self.states()[name].state) if name in self.states() else "unknown"

    def until(self, found: Callable[[], Any], seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < deadline, f"not in time: {self.states()}\n{self._told.read_text()[-3000:]}"
            time.sleep(0.2)
        return value

    def woken_by_hand(self, name: str) -> MacPower:
        """Packets until it is awake: the first may come before its adapter listens."""
        index, spec = next((i, spec) for i, spec in enumerate(self.rack.current.nodes) if spec.name == name)
        assert self.rack.current.wake_port is not None
        target, port = Target(hardware_address(index), spec.address), self.rack.current.wake_port

        def woken() -> MacPower | None:
            send(target, port)
            mac = self.states()[name]
            return mac if mac.state is Power.AWAKE else None

        found: MacPower = self.until(woken, 40)
        return found

    def demand(self, *names: str, hold_s: float = 0.0) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", DEMAND, ",".join(names), str(hold_s)],
            env=self.environ, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def all_asleep(self) -> None:
        self.until(lambda: {self.state(name) for name in ("mac-1", "mac-2", "mac-3")} == {"asleep"}, 60)


@pytest.fixture(scope="module")
def sleeping() -> Iterator[Sleeping]:
    with tempfile.TemporaryDirectory(prefix="pms", dir="/tmp") as state:
        folder = Path(state)

        environ = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"XDG_STATE_HOME": state}
        simulation = Simulation(3, sleep=IDLE_S, wake_deadline=WAKE_S)
        rack = simulate.start(simulation, RackKey.generate(), environ, prepare=for_simulated(folder))
        try:
            found = Sleeping(rack, folder)
            try:
                yield found
            finally:
                found.close()
        finally:
            rack.down()


def test_stray_packets_wake_nobody(sleeping: Sleeping) -> None:
    sleeping.all_asleep()
    assert sleeping.rack.current.wake_port is not None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for packet in (b"", b"\xff" * 102, b"hello" * 40):
            sender.sendto(packet, (sleeping.rack.macs[0].address, sleeping.rack.current.wake_port))
    send(Target("02:00:00:00:00:63", sleeping.rack.macs[0].address), sleeping.rack.current.wake_port)
    time.sleep(4)
    assert sleeping.state("mac-1") == "asleep"


def test_all_or_none_of_a_group_wake_and_sleep_again_when_it_is_gone(sleeping: Sleeping) -> None:
    sleeping.all_asleep()
    driver = sleeping.demand("mac-1", "mac-2", hold_s=IDLE_S + 4)
    sleeping.until(lambda: sleeping.state("mac-1") == sleeping.state("mac-2") == "awake", 60)
    assert sleeping.state("mac-3") == "asleep"
    assert driver.stdout is not None
    assert driver.stdout.readline() == "placed\n"
    placed = time.monotonic()
    while driver.poll() is None:  # in use for longer than the idle time
        assert sleeping.state("mac-1") == sleeping.state("mac-2") == "awake"
        time.sleep(0.5)
    assert time.monotonic() - placed > IDLE_S
    sleeping.all_asleep()
    assert [sleeping.states()[name].wakes for name in ("mac-1", "mac-2", "mac-3")] == [1, 1, 0]


def test_one_that_is_woken_by_hand_is_adopted_and_sleeps_when_idle(sleeping: Sleeping) -> None:
    awake = sleeping.woken_by_hand("mac-3")
    assert (awake.wakes, awake.failures) == (0, 0)
    sleeping.all_asleep()


def test_a_node_that_crashes_is_started_again_by_the_macs_agent(sleeping: Sleeping) -> None:
    driver = sleeping.demand("mac-3", hold_s=60)
    before = sleeping.until(lambda: (mac := sleeping.states()["mac-3"]).state is Power.AWAKE and mac, 60)
    sleeping.rack.crash("mac-3")
    sleeping.until(lambda: (m := sleeping.states()["mac-3"]).state is Power.AWAKE and m.instance != before.instance, 60)
    driver.kill()
    driver.wait()
    sleeping.all_asleep()


def test_a_mac_that_is_not_let_sleep_says_so_at_once_and_stays_in_the_rack(sleeping: Sleeping, tmp_path: Path) -> None:
    """Its sudo and pmset are stand-ins that print and end as macOS's do to a job that runs as a user."""
    sleeping.all_asleep()
    sleeping.rack.kill("mac-3")
    for name, body in (
        ("sudo", "echo 'sudo: a password is required' >&2; exit 1"),
        ("pmset", "echo 'Sleep error 0xe00002c1; You must run this as root.'; exit 77"),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    log = tmp_path / "log"
    record = str(sleeping.rack.current.folder / RECORD)
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", AGENT, record, "mac-3", tmp_path / "sudo", tmp_path / "pmset"],
            env=sleeping.environ, stdout=file, stderr=file,
        )  # fmt: skip
    try:
        first = sleeping.until(lambda: (mac := sleeping.states()["mac-3"]).state is Power.AWAKE and mac, 60)
        again = sleeping.until(
            lambda: (mac := sleeping.states()["mac-3"]).state is Power.AWAKE
            and mac.instance != first.instance and mac, 90,
        )  # fmt: skip
        assert again.failures == 0
        told = next(line for line in log.read_text().splitlines() if "cannot be put to sleep" in line)
        assert "ended with 1: sudo: a password is required" in told
        assert "ended with 77: Sleep error 0xe00002c1; You must run this as root" in told
    finally:
        process.kill()
        process.wait()
        sleeping.rack.kill("mac-3")
        sleeping.rack.power_on("mac-3")


def test_one_without_power_is_set_aside_and_taken_again_when_it_comes(sleeping: Sleeping) -> None:
    sleeping.rack.kill("mac-2")
    driver = sleeping.demand("mac-2")
    aside = sleeping.until(lambda: (mac := sleeping.states()["mac-2"]).state is Power.SET_ASIDE and mac, WAKE_S + 20)
    assert aside.failures == 1
    assert f"did not join within {WAKE_S:g} s" in aside.reason
    driver.kill()
    driver.wait()
    sleeping.rack.power_on("mac-2")
    awake = sleeping.woken_by_hand("mac-2")
    assert (awake.failures, awake.reason) == (0, "")


def test_a_head_that_restarts_finds_its_macs_and_what_it_knew_of_them(sleeping: Sleeping) -> None:
    before = sleeping.woken_by_hand("mac-1")
    rack = sleeping.rack.current
    head = rack.nodes[0]
    sleeping.close()
    kin.kill(ray_node.kin_of(head, rack.membership.session))
    starting.bring_up([head], rack.membership, sleeping.environ, lambda _: None)
    sleeping.watch()
    again = sleeping.until(lambda: (m := sleeping.states().get("mac-1")) and m.state is Power.AWAKE and m, 90)
    assert again.instance != before.instance
    assert again.wakes == before.wakes > 0
    assert sleeping.states()["mac-2"].wakes > 0
    sleeping.all_asleep()
