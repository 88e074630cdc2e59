"""What macOS answers is read as it is meant, and each fault of a Mac is found with its cure."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.cli import doctor_mac, mac_facts, neighbours
from pomarium.cluster.cli.doctor_mac import TROUBLES, diagnose, troubles
from pomarium.cluster.cli.mac_facts import Firewall, MacFacts

ANSWERS = Path(__file__).parents[2] / "darwin" / "doctor"
WELL = MacFacts((15, 6, 1), False, {"sleep": 0, "womp": 1, "lowpowermode": 0}, Firewall.OFF, "192.168.7.1", False)


def answer(name: str) -> str:
    return (ANSWERS / f"{name}.txt").read_text()


def test_power_settings() -> None:
    awake = mac_facts.power(answer("pmset_awake"))
    assert (awake["sleep"], awake["womp"], awake["lowpowermode"]) == (0, 1, 0)
    sleeps = mac_facts.power(answer("pmset_sleeps"))
    assert (sleeps["sleep"], sleeps["womp"], sleeps["lowpowermode"]) == (1, 0, 1)
    assert sleeps["Sleep On Power Button"] == 1
    assert "hibernatefile" not in sleeps


@pytest.mark.parametrize(
    ("name", "state"), [("off", Firewall.OFF), ("on", Firewall.ON), ("blocks", Firewall.BLOCKS_ALL)]
)
def test_the_firewall(name: str, state: Firewall) -> None:
    assert mac_facts.firewall(answer(f"firewall_{name}")) is state


def test_the_router() -> None:
    assert mac_facts.gateway(answer("route_default")) == "192.168.7.1"
    assert mac_facts.gateway(answer("route_none")) is None


@given(st.text())
def test_no_answer_breaks_a_parser(text: str) -> None:
    mac_facts.power(text)
    mac_facts.version(text)
    assert mac_facts.gateway("") is None
    assert mac_facts.firewall(text) in Firewall


def test_a_mac_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands are those that answer; without them all is unknown, and nothing is raised."""

    def ask(command: Sequence[str]) -> str:
        answers = {"pmset": "pmset_sleeps", mac_facts.SOCKETFILTERFW: "firewall_on", "route": "route_default"}
        return "1\n" if command[0] == "sysctl" else answer(answers[command[0]])

    monkeypatch.setattr(mac_facts, "no_route", lambda address: address == "192.168.7.1")
    seen = mac_facts.gather(ask)
    assert (seen.translated, seen.firewall, seen.gateway, seen.unreachable) == (True, Firewall.ON, "192.168.7.1", True)
    assert seen.power["sleep"] == 1
    nothing = mac_facts.gather()
    assert (nothing.translated, nothing.firewall) == (False, Firewall.UNKNOWN)


def test_a_router_that_answers_or_refuses_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert not mac_facts.no_route("127.0.0.1", port)
    assert not mac_facts.no_route("127.0.0.1", port), "refused"


def test_no_route_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        raise OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert mac_facts.no_route("192.168.7.1")


@pytest.mark.parametrize(
    ("change", "joins", "faults"),
    [
        ({}, True, {}),
        ({"version": (14, 7)}, False, {"macOS": True}),
        ({"version": (15, 7, 4)}, False, {"macOS": False}),
        ({"translated": True}, False, {"Rosetta": True}),
        ({"unreachable": True}, False, {"local network": False}),
        ({"gateway": None}, True, {}),
        ({"firewall": Firewall.BLOCKS_ALL}, False, {}),
        ({"firewall": Firewall.BLOCKS_ALL}, True, {"firewall": False}),
        ({"firewall": Firewall.ON}, True, {"firewall": False}),
        ({"power": {"sleep": 10}}, False, {"sleep": False}),
        ({"power": {"womp": 0}}, False, {}),
        ({"power": {"womp": 0}}, True, {"wake on LAN": False}),
        ({"power": {"lowpowermode": 1}}, False, {"low power mode": False}),
    ],
)
def test_each_fault_of_a_mac(change: dict[str, Any], joins: bool, faults: dict[str, bool]) -> None:
    found = diagnose(replace(WELL, **change), joins)
    assert {each.subject: each.fatal for each in found if each.cure} == faults


@pytest.mark.parametrize(
    ("version", "count"),
    [((), 0), ((15, 6, 1), 0), ((15, 7), 1), ((26, 4), 2), ((26, 4, 1), 2), ((26, 5), 2), ((26, 6), 0), ((27,), 0)],
)
def test_versions_with_known_trouble(version: tuple[int, ...], count: int) -> None:
    assert len(troubles(version)) == count


def test_each_trouble_has_a_source_and_is_shown() -> None:
    for each in TROUBLES:
        shown = [finding.state for finding in diagnose(replace(WELL, version=each.first), False)]
        assert any(each.source in state for state in shown)


def test_other_commands_and_packages_are_found(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "pomarium-1.dist-info").mkdir(parents=True)
        (tmp_path / folder / "pomarium-1.dist-info" / "METADATA").write_text("Name: pomarium\nVersion: 1\n")
        (tmp_path / folder / "pomarium-1.dist-info" / "INSTALLER").write_text("pip\n")
        (tmp_path / folder / "pomarium").write_text("#!/bin/sh\n")
        (tmp_path / folder / "pomarium").chmod(0o755)
    (tmp_path / "c").symlink_to(tmp_path / "a")
    folders = [str(tmp_path / name) for name in "abc"]
    found = neighbours.gather({"PATH": os.pathsep.join(folders)}, folders)
    assert found.commands == (str(tmp_path / "a/pomarium"), str(tmp_path / "b/pomarium"))
    assert found.packages == (str(tmp_path / "a"), str(tmp_path / "b"))


def test_this_installation_is_one() -> None:
    assert len(neighbours.gather(os.environ).packages) == 1


def test_another_process_that_serves_is_found() -> None:
    code = "import sys; print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, "/somewhere/pomarium", "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert process.pid in neighbours.gather(os.environ).serving
        process.communicate()
    assert process.pid not in neighbours.gather(os.environ).serving


@pytest.mark.parametrize(
    ("command", "stays"),
    [
        (["python", "/x/bin/pomarium", "serve", "m"], True),
        (["python", "-m", "pomarium.cluster.cli.main", "rack", "up"], True),
        (["pomarium", "doctor"], False),
        (["vi", "pomarium"], False),
        ([], False),
    ],
)
def test_command_lines(command: list[str], stays: bool) -> None:
    assert neighbours.stays(command) is stays


def test_the_oldest_macos_is_that_of_the_pins() -> None:
    assert doctor_mac.OLDEST == (15,)
    text = (Path(__file__).parents[3] / "README.md").read_text()
    assert "macOS 15" in text
