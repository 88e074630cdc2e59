"""Each fault of a machine is found, named with a cure, and decides the exit code."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import selftest_faults

from pomarium.cluster.cli import doctor
from pomarium.cluster.cli.mac_facts import Firewall, MacFacts
from pomarium.cluster.cli.machine import PINS, Facts, device_apart, gather
from pomarium.cluster.cli.neighbours import Neighbours

WELL = Facts(
    python=(3, 11, 7),
    system="Linux",
    machine="x86_64",
    hostname="box",
    host_is_loopback=False,
    versions={**PINS, "torch": "2.13.0+cpu", "fastapi": "0.136.3", "mlx-cpu": PINS["mlx"]},
    memory_total=16 * doctor.GIB,
    memory_available=8 * doctor.GIB,
    disk_free=50 * doctor.GIB,
    port_free=True,
    temp_folder="/tmp",
    device="cpu",
    device_fault=None,
    blas="OpenBLAS",
    blas_fault=None,
    settings_fault=None,
    embedded_fault=None,
    folders={"state": ("/state/pomarium", None), "cache": ("/cache/pomarium", None)},
    ray_reachable=None,
    environ={},
)
RACK = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}
MAC_SAYS = MacFacts((15, 6, 1), False, {"sleep": 0, "womp": 1, "lowpowermode": 0}, Firewall.OFF, "192.168.7.1", False)
MAC = replace(
    WELL,
    mac=MAC_SAYS,
    system="Darwin",
    machine="arm64",
    ray_reachable=True,
    environ={**RACK, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"},
)


def faults(facts: Facts) -> dict[str, bool]:
    """Subject -> fatal, of the findings that have a cure."""
    return {f.subject: f.fatal for f in doctor.diagnose(facts) if f.cure}


@pytest.mark.parametrize("facts", [WELL, MAC, replace(WELL, environ=RACK, ray_reachable=True)])
def test_a_sound_machine_has_no_fault(facts: Facts) -> None:
    assert faults(facts) == {}


@pytest.mark.parametrize(
    ("base", "change", "subject", "fatal"),
    [
        (WELL, {"python": (3, 10, 1)}, "Python", True),
        (WELL, {"folders": {"state": ("/no", "Permission denied")}}, "state folder", True),
        (WELL, {"folders": {"cache": ("", "HOME is not set")}}, "cache folder", True),
        (WELL, {"versions": {**WELL.versions, "ray": "2.59.0"}}, "ray", True),
        (WELL, {"versions": {**WELL.versions, "vllm": None}}, "vllm", True),
        (WELL, {"versions": {**WELL.versions, "fastapi": "0.137.0"}}, "fastapi", True),
        (WELL, {"versions": {**WELL.versions, "mlx-cpu": "0.32.3"}}, "mlx-cpu", True),
        (WELL, {"memory_available": 1}, "memory", False),
        (WELL, {"disk_free": 1}, "disk", True),
        (WELL, {"port_free": False}, "port 8000", False),
        (WELL, {"device": None, "device_fault": "No GPU."}, "device", True),
        (WELL, {"blas": None, "blas_fault": "Install it."}, "BLAS", False),
        (WELL, {"settings_fault": "X is wrong."}, "settings", True),
        (WELL, {"diversions": ("X makes vLLM ignore us: unset it.",)}, "vLLM's platform", True),
        (WELL, {"neighbours": Neighbours(commands=("/a/pomarium", "/b/pomarium"))}, "commands named pomarium", False),
        (WELL, {"neighbours": Neighbours(packages=("/a", "/b"))}, "installed twice", False),
        (WELL, {"neighbours": Neighbours(serving=(12,))}, "another pomarium runs", False),
        (WELL, {"environ": {"VLLM_USE_V1": "1", "MLX_X": "2", "VLLM_METAL_DEBUG": "1"}}, "variables", False),
        (WELL, {"embedded_fault": "Reinstall."}, "embedded model", True),
        (WELL, {"temp_folder": "/a/very/long/temporary/folder"}, "RAY_TMPDIR", True),
        (WELL, {"environ": RACK, "ray_reachable": False}, "Ray", True),
        (WELL, {"environ": {"RAY_ADDRESS": "h:1"}, "ray_reachable": True}, "RAY_AUTH_MODE", True),
        (MAC, {"machine": "x86_64"}, "machine", True),
        (MAC, {"machine": "x86_64", "mac": replace(MAC_SAYS, translated=True)}, "Rosetta", True),
        (MAC, {"environ": RACK}, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", True),
        (MAC, {"environ": {**MAC.environ, "RAY_OBJECT_STORE_MEMORY": "9" * 11}}, "RAY_OBJECT_STORE_MEMORY", True),
        (MAC, {"hostname": "mac.local", "host_is_loopback": True}, "host name", True),
    ],
)
def test_each_fault_is_named(base: Facts, change: dict[str, Any], subject: str, fatal: bool) -> None:
    assert faults(replace(base, **change)) == {subject: fatal}


def test_foreign_variables_are_named_without_their_values() -> None:
    findings = doctor.diagnose(replace(WELL, environ={"VLLM_API_KEY": "secret", "VLLM_METAL_DEBUG": "1"}))
    assert "note  variables: VLLM_API_KEY" in doctor.report(findings).splitlines()


def test_the_report_shows_the_cure_below_its_fault() -> None:
    lines = doctor.report(doctor.diagnose(replace(WELL, settings_fault="X is wrong: set it to 1."))).splitlines()
    at = lines.index("FAULT settings: invalid")
    assert lines[at + 1].strip() == "-> X is wrong: set it to 1."
    assert sum(line.startswith("FAULT") for line in lines) == 1


def test_pins_are_those_of_the_requirement_files() -> None:
    root = Path(__file__).parents[3]
    text = "".join(p.read_text() for p in (root / "requirements").glob("*.txt"))
    pinned = dict(re.findall(r"^([A-Za-z0-9_-]+)==([\w.]+)", text, re.M))
    found = {name: pinned.get(name) or pinned.get(f"{name}-cpu") for name in PINS}
    assert found == dict(PINS)


def test_a_metal_that_ends_the_process_is_told_of(tmp_path: Path) -> None:
    environ = os.environ | selftest_faults.preload(tmp_path, "aborting_metal")
    device, fault = device_apart(environ)
    assert device is None
    assert fault == "its process was ended by SIGABRT NSRangeException: index 0 beyond bounds for empty array"
    assert device_apart(os.environ)[1] is None


def test_this_machine_can_be_looked_at() -> None:
    facts = gather({"RAY_ADDRESS": "127.0.0.1:1", "VLLM_METAL_DEBUG": "maybe"})
    assert facts.ray_reachable is False
    assert facts.settings_fault is not None
    assert "VLLM_METAL_DEBUG" in facts.settings_fault
    assert facts.memory_total > 0
    assert facts.versions["ray"] == PINS["ray"]
