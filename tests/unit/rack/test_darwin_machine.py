"""What a Mac tells a rack of itself, run on any system with what macOS prints on five chips (tests/darwin)."""

import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import psutil
import pytest
from darwin_commands import MACS, RUNNER, Recording
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.autoscaling import wake_on_lan
from pomarium.cluster.machine import chips
from pomarium.cluster.rack import machine_facts
from pomarium.cluster.rack.machine_facts import Known
from pomarium.cluster.rack.placement_inputs import REACHED_BANDWIDTH, working_set
from pomarium.worker import device
from pomarium.worker.errors import SettingsError
from pomarium.worker.settings import AUTO_FRACTION

GIB = 1 << 30
CHIPS = {"m1": ("M1", 68), "m2-ultra": ("M2 Ultra", 800), "m3-ultra": ("M3 Ultra", 819), "m4-pro": ("M4 Pro", 273),
         "m5-max": ("M5 Max", 614)}  # fmt: skip


@pytest.fixture(params=MACS, ids=lambda mac: mac.name)
def mac(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """This machine is that Mac, as far as it is asked."""
    found: Recording = request.param
    become(found, tmp_path, monkeypatch)
    info = found.device_info()
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda _: info)
    monkeypatch.setattr(device, "_fault", lambda kind: None)
    memory = SimpleNamespace(total=int(info["memory_size"]), available=int(info["memory_size"]) // 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    return found


def become(found: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found.stand_ins(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")


def test_a_mac_s_facts_are_its_chip_s_and_its_working_set_s(mac: Recording) -> None:
    name, bandwidth = CHIPS[mac.name]
    info = mac.device_info()
    found = machine_facts.gather(Known(), "studio-1", {})
    assert (found.name, found.chip, found.memory) == ("studio-1", name, info["memory_size"])
    assert found.model_memory == int(int(info["max_recommended_working_set_size"]) * AUTO_FRACTION)
    assert found.bandwidth == pytest.approx(bandwidth * 1e9 * REACHED_BANDWIDTH)


@pytest.mark.parametrize("mac", MACS, ids=lambda mac: mac.name)
def test_sysctl_and_mlx_tell_the_same_memory_and_chip(mac: Recording) -> None:
    """Else a recording would be of two Macs."""
    info = mac.device_info()
    assert int(mac.sysctl("hw.memsize")) == info["memory_size"]
    assert mac.sysctl("machdep.cpu.brand_string") == info["device_name"]


@pytest.mark.parametrize("mac", MACS, ids=lambda mac: mac.name)
def test_the_estimate_of_rack_yaml_is_no_more_than_macos_recommends(mac: Recording) -> None:
    info = mac.device_info()
    recommended = int(info["max_recommended_working_set_size"])
    assert 0.85 * recommended < working_set(int(info["memory_size"])) <= recommended


def test_a_virtual_mac_s_chip_is_not_in_the_table_and_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(RUNNER, tmp_path, monkeypatch)
    environ = {"VLLM_MLX_DEVICE": "cpu", "XDG_STATE_HOME": str(tmp_path / "state")}
    found = machine_facts.gather(Known(), "runner", environ)
    assert found.chip == "Apple M1 (Virtual)"
    assert not chips.is_apple(found.chip)
    assert found.memory == 7 * GIB
    assert found.bandwidth > 1e8


def test_a_system_without_its_commands_is_to_be_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"`sysctl .*--rack"):
        machine_facts.gather(Known(), "m", {})


def test_a_system_profiler_that_says_nothing_costs_the_number_of_cores_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    become(MACS[0], tmp_path, monkeypatch)
    (tmp_path / "bin/system_profiler").write_text("#!/bin/sh\nexit 1\n")
    found = machine_facts.gather(Known(), "m", {"VLLM_MLX_DEVICE": "cpu"})
    assert found.chip == "M1"


# --- whatever the commands print --------------------------------------------------------------------------------------


DISPLAYS = (MACS[0].folder / "system_profiler.json").read_text()
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["SPDisplaysDataType", "sppci_cores", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.text(max_size=200) | json_values.map(json.dumps))
def test_any_list_of_displays_gives_a_number_of_cores_or_none(displays: str) -> None:
    cores = machine_facts.mac_hardware("machdep.cpu.brand_string: Apple M1\nhw.memsize: 8\n", displays).gpu_cores
    assert cores is None or cores > 0


@given(st.text(st.characters(codec="utf-8", exclude_characters="0123456789"), max_size=20))
def test_a_number_of_cores_that_is_none_is_left_out(cores: str) -> None:
    displays = json.dumps({"SPDisplaysDataType": [{"sppci_cores": cores}]})
    assert machine_facts.mac_hardware("machdep.cpu.brand_string: M1\nhw.memsize: 8\n", displays).gpu_cores is None


@given(
    st.text(max_size=100) | st.from_regex(r"(machdep\.cpu\.brand_string|hw\.memsize): [^\n]{0,20}\n", fullmatch=True)
)
def test_any_answer_of_sysctl_gives_a_chip_and_memory_or_one_sentence(sysctl: str) -> None:
    for text in (sysctl, f"{sysctl}hw.memsize: 17179869184\n", f"machdep.cpu.brand_string: Apple M1\n{sysctl}"):
        with suppress(SettingsError):
            found = machine_facts.mac_hardware(text, DISPLAYS)
            assert found.memory > 0
            assert found.chip


# --- its network ------------------------------------------------------------------------------------------------------


def test_a_packet_leaves_a_mac_by_its_ethernet_and_not_by_its_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    """bridge0 is the Thunderbolt bridge, utun3 a VPN."""
    monkeypatch.setattr(psutil, "net_if_addrs", next(mac for mac in MACS if mac.name == "m4-pro").net_if_addrs)
    interfaces = wake_on_lan.read_interfaces()
    assert {interface.address for interface in interfaces if interface.broadcasts} == {"192.168.1.2", "169.254.33.4"}
    assert [host for host, _ in wake_on_lan.destinations("192.168.1.9", interfaces)] == [
        "192.168.1.9", "192.168.1.255", wake_on_lan.LIMITED_BROADCAST,
    ]  # fmt: skip
