"""What a machine tells a rack of itself, where the rack's key comes from, what is refused before anything starts."""

import argparse
import json
import socket
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.cli import rack_options
from pomarium.cluster.cli.main import main, parse
from pomarium.cluster.cli.rack import invitation
from pomarium.cluster.machine import speed
from pomarium.cluster.machine.speed import Speed
from pomarium.cluster.node import ports
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.cluster.rack import current, inventory, key_file, machine_facts, netns, this_machine
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.rack.machine_facts import Hardware, Known
from pomarium.cluster.rack.placement_inputs import working_set
from pomarium.cluster.rack.simulate import Simulation
from pomarium.worker import device
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.errors import SettingsError
from pomarium.worker.memory import reserve_of
from pomarium.worker.settings import AUTO_FRACTION, DeviceKind

GIB = 1 << 30
SYSCTL = "machdep.cpu.brand_string: Apple M4 Max\nhw.memsize: 68719476736\n"
DISPLAYS = json.dumps({
    "SPDisplaysDataType": [
        {"_name": "DELL", "spdisplays_vendor": "x"},
        {"_name": "Apple M4 Max", "sppci_cores": "40", "sppci_model": "Apple M4 Max"},
    ]
})  # fmt: skip
STUDIO = Hardware("Apple M4 Max", 40, 64 * GIB)


def test_macos_tells_chip_cores_and_memory() -> None:
    assert machine_facts.mac_hardware(SYSCTL, DISPLAYS) == STUDIO
    for displays in ("", "{}", '{"SPDisplaysDataType": [{"sppci_cores": "unknown"}]}'):
        assert machine_facts.mac_hardware(SYSCTL, displays) == replace(STUDIO, gpu_cores=None)


@pytest.mark.parametrize("sysctl", ["", "hw.memsize: 1\n", "machdep.cpu.brand_string: x\nhw.memsize: ?\n"])
def test_a_mac_that_tells_nothing_is_to_be_described(sysctl: str) -> None:
    with pytest.raises(SettingsError, match="--rack"):
        machine_facts.mac_hardware(sysctl, DISPLAYS)


def test_the_table_gives_the_speed_of_apple_s_chips() -> None:
    found = machine_facts.facts(Known(), "studio-2", STUDIO, 40 * GIB, None)
    assert (found.chip, found.memory, found.model_memory) == ("M4 Max", 64 * GIB, 40 * GIB)
    assert found.bandwidth == pytest.approx(546e9 * 0.75)
    assert found.flops > 5e12


def test_what_the_user_says_comes_first() -> None:
    known = Known(memory_limit=8 * GIB, model_memory=6 * GIB, bandwidth=1e11, flops=2e12, chip="M9 Ultra")
    found = machine_facts.facts(known, "m", STUDIO, 40 * GIB, None)
    assert (found.chip, found.memory, found.model_memory) == ("M9 Ultra", 8 * GIB, 6 * GIB)
    assert (found.bandwidth, found.flops) == (1e11, 2e12)
    half = machine_facts.facts(Known(bandwidth=1e11), "m", Hardware("EPYC", None, GIB), GIB, Speed(5e9, 7e10))
    assert (half.bandwidth, half.flops) == (1e11, 7e10)


def test_a_chip_that_is_not_in_the_table_is_refused_with_what_to_say() -> None:
    with pytest.raises(SettingsError, match="bandwidth"):
        machine_facts.facts(Known(), "m", Hardware("Apple M9", 10, GIB), GIB, None)


def test_linux_tells_the_processor_s_name() -> None:
    assert machine_facts.cpu_name("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nflags\t: x\n") == "AMD EPYC 7B13"
    assert machine_facts.cpu_name("processor\t: 0\nCPU part\t: 0xd0c\n") is None


@pytest.mark.parametrize("measure", [speed.of_processor, lambda: speed.measure_gpu("Apple M9", side=1024, product=256)])
def test_this_machine_is_measured_within_bounds(measure: Callable[[], Speed]) -> None:
    found = measure()
    assert 1e8 < found.bandwidth < 1e13
    assert 1e6 < found.flops < 1e14


M9 = "machdep.cpu.brand_string: Apple M9\nhw.memsize: 34359738368\n"


@pytest.fixture
def new_mac(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """A Mac with a chip that came after the table, on macOS; its environment."""
    told = {"sysctl": M9, "system_profiler": json.dumps({"SPDisplaysDataType": [{"sppci_cores": "12"}]})}
    monkeypatch.setattr(machine_facts.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(machine_facts, "_output", lambda *command: told[command[0]])
    gpu = Device(DeviceKind.GPU, GpuBackend.METAL, "Apple M9", ("float16",))
    monkeypatch.setattr(device, "detect", lambda values: gpu)
    monkeypatch.setattr(machine_facts, "model_memory", lambda limit, environ: 9 * GIB)
    return {"XDG_STATE_HOME": str(tmp_path)}


def test_a_chip_that_came_after_the_table_is_measured_once(
    new_mac: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(chip: str) -> Speed:
        measured.append(chip)
        return Speed(1.5e11, 9e12)

    monkeypatch.setattr(speed, "measure_gpu", measure)
    for _ in range(2):
        found = machine_facts.gather(Known(), "new", new_mac)
        assert (found.chip, found.bandwidth, found.flops) == ("Apple M9", 1.5e11, 9e12)
    assert measured == ["Apple M9"]
    half = machine_facts.gather(Known(bandwidth=2e11), "new", new_mac)
    assert (half.bandwidth, half.flops) == (2e11, 9e12)
    file = Path(new_mac["XDG_STATE_HOME"]) / "pomarium/speed.json"
    for damaged in ("", "[]", "{}", file.read_text().replace("Apple M9", "Apple M8")):
        file.write_text(damaged)
        machine_facts.gather(Known(), "new", new_mac)
    assert measured == ["Apple M9"] * 5
    machine_facts.gather(Known(bandwidth=2e11, flops=1e13), "new", new_mac)
    assert measured == ["Apple M9"] * 5, "nothing is left to measure"


def test_a_chip_that_cannot_be_measured_is_refused_with_the_options(
    new_mac: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlx.core as mx

    def broken(*arguments: object) -> None:
        raise RuntimeError("[metal::load_device] No Metal device.")

    monkeypatch.setattr(mx, "eval", broken)
    with pytest.raises(SettingsError, match="'Apple M9' is not in the table and could not be measured") as refusal:
        machine_facts.gather(Known(), "new", new_mac)
    assert "--bandwidth" in str(refusal.value)
    assert "--flops" in str(refusal.value)


def test_what_the_user_names_is_looked_up_and_not_measured() -> None:
    new, old = Hardware("Apple M9", 12, GIB), Hardware("Apple M4", 10, GIB)
    assert machine_facts.is_to_be_measured(Known(), new)
    assert machine_facts.is_to_be_measured(Known(), replace(old, gpu_cores=9))
    assert not machine_facts.is_to_be_measured(Known(), old)
    assert not machine_facts.is_to_be_measured(Known(chip="M4"), new)
    assert not machine_facts.is_to_be_measured(Known(gpu_cores=77), old)
    assert not machine_facts.is_to_be_measured(Known(bandwidth=1.0, flops=1.0), new)
    assert machine_facts.is_to_be_measured(Known(bandwidth=1.0), Hardware("AMD EPYC", None, GIB))


def test_this_machine_s_memory_is_what_its_workers_would_take() -> None:
    known = Known(bandwidth=1e10, flops=1e11)
    whole = machine_facts.gather(known, "m", {})
    assert whole.model_memory == pytest.approx(0.9 * whole.memory, rel=0.2)
    half = machine_facts.gather(replace(known, memory_limit=4 * GIB), "m", {"VLLM_METAL_MEMORY_FRACTION": "0.5"})
    assert (half.memory, half.model_memory) == (4 * GIB, 2 * GIB)


def test_a_plan_never_counts_on_what_a_worker_keeps_free() -> None:
    all_of_it = machine_facts.gather(Known(bandwidth=1e10, flops=1e11), "m", {"VLLM_METAL_MEMORY_FRACTION": "1"})
    assert all_of_it.model_memory <= all_of_it.memory - reserve_of(all_of_it.memory)


@given(st.integers(2 * GIB, 1024 * GIB))
def test_a_macs_share_of_its_working_set_leaves_the_reserve(memory: int) -> None:
    assert working_set(memory) * AUTO_FRACTION <= memory - reserve_of(memory)


def test_rack_yaml_is_searched_by_name_and_then_by_address() -> None:
    text = "macs:\n- {name: a, address: 10.0.0.1, memory: 16GiB, chip: M4, model_memory: 9GiB}\n"
    found = inventory.parse(text + "- {name: b, address: 10.0.0.2, memory: 16GiB, chip: M4}\n")
    assert machine_facts.known_of(found, "b", "10.0.0.1").name == "b"
    entry = machine_facts.known_of(found, "host", "10.0.0.1")
    assert machine_facts.merged(Known("host", memory_limit=1, bandwidth=5.0), entry) == Known(
        "a", "M4", None, 9 * GIB, 1, 5.0, None
    )
    with pytest.raises(SettingsError, match="a, b"):
        machine_facts.known_of(found, "c", "10.0.0.9")


@pytest.mark.parametrize(
    ("hostname", "name"), [("studio-1.local", "studio-1"), ("Anns Mac", "Anns-Mac"), ("x" * 80, "x" * 63)]
)
def test_a_host_name_gives_a_name(hostname: str, name: str) -> None:
    assert machine_facts.own_name(hostname) == name


def test_a_host_name_that_gives_none_is_named() -> None:
    with pytest.raises(SettingsError, match="--name"):
        machine_facts.own_name("...")


def test_the_key_is_made_once_and_kept_for_its_owner(tmp_path: Path) -> None:
    environ = {"XDG_CONFIG_HOME": str(tmp_path)}
    key = key_file.made(environ)
    assert key_file.made(environ) == key == key_file.stored(environ)
    assert stat.S_IMODE(key_file.key_path(environ).stat().st_mode) == 0o600
    key_file.key_path(environ).chmod(0o644)
    key_file.store(key, environ)
    assert stat.S_IMODE(key_file.key_path(environ).stat().st_mode) == 0o600


def test_a_key_comes_from_the_option_the_variable_the_file_or_the_user(tmp_path: Path) -> None:
    one, two, three, four = (RackKey.generate() for _ in range(4))
    environ: dict[str, str] = {"XDG_CONFIG_HOME": str(tmp_path)}
    with pytest.raises(SettingsError, match="--key"):
        key_file.known(None, environ)
    assert key_file.known(None, environ, lambda _: four.text) == four
    key_file.store(three, environ)
    assert key_file.known(None, environ) == three
    assert key_file.known(None, environ | {key_file.KEY_VARIABLE: two.text}) == two
    assert key_file.known(one.text, environ | {key_file.KEY_VARIABLE: two.text}) == one
    key_file.key_path(environ).write_text("nonsense")
    with pytest.raises(SettingsError, match=r"rack\.key"):
        key_file.known(None, environ)


def test_the_head_s_address_is_resolved_to_numbers() -> None:
    assert this_machine.resolve("127.0.0.5") == "127.0.0.5:6379"
    assert this_machine.resolve("localhost:7000") == "127.0.0.1:7000"
    for head in ("", ":1", "a:b", "10.0.0.1:0", "10.0.0.1:70000", "no-such-host.invalid"):
        with pytest.raises(SettingsError):
            this_machine.resolve(head)


@pytest.fixture
def another_address() -> str:
    """An address of this machine beside 127.0.0.1. Linux's loopback has them all, macOS's that one alone."""
    for choose in (lambda: "127.0.0.9", lambda: this_machine.own_address(None, this_machine.TEST_ADDRESS)):
        try:
            address = choose()
            ports.check_local(address)
        except SettingsError:
            continue
        return address
    pytest.skip("this machine has the address 127.0.0.1 alone: `sudo ifconfig lo0 alias 127.0.0.9` on a Mac")


def test_a_given_address_of_this_machine_is_taken(another_address: str) -> None:
    assert this_machine.own_address(another_address, "192.0.2.1") == another_address


def test_this_machine_s_address_is_one_that_others_reach() -> None:
    with pytest.raises(SettingsError, match="--address"):
        this_machine.own_address(None, "127.0.0.1")  # the way there begins at 127.0.0.1
    for address in ("127.0.0.1", "0.0.0.0", "localhost", "::1", "192.0.2.7"):
        with pytest.raises(SettingsError, match="address"):
            this_machine.own_address(address, "192.0.2.1")


def test_a_head_that_does_not_answer_and_a_taken_port_are_named(another_address: str, tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    machine = this_machine.Machine(Known("m", bandwidth=1e9, flops=1e9), None, another_address)
    with socket.create_server((another_address, 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SettingsError, match=f"Port {port}"):
            this_machine.up(machine, port, RackKey.generate(), environ, print)
    with pytest.raises(SettingsError, match=f"No rack answers at {another_address}:{port}"):
        this_machine.join(machine, f"{another_address}:{port}", RackKey.generate(), environ, print)
    assert list(tmp_path.iterdir()) == []


def test_the_invitation_names_what_the_others_type() -> None:
    key = RackKey.generate()
    spec = NodeSpec("m", "10.0.0.1", Path("/x"))
    for address, shown in (("10.0.0.1:6379", "10.0.0.1"), ("10.0.0.1:7000", "10.0.0.1:7000")):
        rack = current.CurrentRack(Membership("s", address, "t"), (spec,), Path("/x"))
        assert f"  pomarium rack join {shown} --key {key.text}" in invitation(rack, key)


def options(*arguments: str) -> argparse.Namespace:
    return parse(["rack", "up", *arguments])


def test_a_simulation_is_read_from_the_options() -> None:
    assert rack_options.simulation_of(options("--simulate", "3")) == Simulation(3)
    found = rack_options.simulation_of(
        options("--simulate", "2", "--memory", "4GiB,2GiB", "--cpus", "0,0-1", "--namespaces", "--link-delay", "0.3ms",
                "--link-rate", "1Gb/s", "--link-loss", "0.1%")
    )  # fmt: skip
    assert (found.memory, found.cores) == ((4 * GIB, 2 * GIB), ((0,), (0, 1)))
    assert found.link == netns.Link(0.0003, 1.25e8, pytest.approx(0.001))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--simulate", "2", "--link-delay", "1ms"], "--namespaces"),
        (["--simulate", "2", "--memory", "4"], "--memory"),
        (["--simulate", "2", "--cpus", "1-0"], "--cpus"),
        (["--simulate", "2", "--namespaces", "--link-loss", "0.1"], "--link-loss"),
        (["--simulate", "2", "--port", "7000"], "--port"),
        (["--simulate", "0"], "--simulate"),
        (["--cpus", "0"], "--simulate"),
        (["--port", "80"], "--port"),
        (["--memory", "0GiB"], "--memory"),
        (["--rack", "/no/such/file"], "/no/such/file"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_starts(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert main(["rack", "up", *arguments]) == 1
    assert named in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_and_down_without_a_rack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert main(["rack", "status"]) == 1
    assert "pomarium rack up" in capsys.readouterr().err
    assert main(["rack", "down"]) == 0


def test_a_rack_file_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = Path(__file__).parents[3] / "deploy" / "rack.example.yaml"
    assert main(["rack", "check", str(example)]) == 0
    assert "3 Mac(s), 2 model(s)" in capsys.readouterr().out
    broken = tmp_path / "rack.yaml"
    broken.write_text("macs:\n- {name: a, address: 10.0.0.1, memory: 16}\n")
    assert main(["rack", "check", str(broken)]) == 1
    assert "line 2" in capsys.readouterr().err
