"""Nodes of a rack on this machine: command line, environment, processes found and ended, record, simulated Macs."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from rack_serving import until
from ray._private.utils import check_version_info

from pomarium.cluster.machine import listening
from pomarium.cluster.node import kin, ports, ray_node, starting
from pomarium.cluster.node.kin import Kin
from pomarium.cluster.node.membership import SAME_PYTHON, Membership
from pomarium.cluster.node.ray_folder import RAY_SOCKET_SUFFIX, SOCKET_PATH_LIMIT
from pomarium.cluster.node.ray_node import MARKER, NodeSpec
from pomarium.cluster.rack import current, netns, teardown
from pomarium.cluster.rack.current import CurrentRack, Network
from pomarium.cluster.rack.labels import facts_of
from pomarium.cluster.rack.placement_inputs import PROCESS_BYTES
from pomarium.cluster.rack.simulate import HEAD, Simulation, specs
from pomarium.worker.errors import SettingsError

GIB = 1 << 30
MEMBERSHIP = Membership("ab12", "10.0.0.1:6379", "f" * 64, Path("/state/tls"))
MAC = NodeSpec("studio-1", "10.0.0.2", Path("/tmp/pm-x/0"), labels={"a/b": "c", "d": "e"}, memory=5 * GIB)
HEAD_NODE = replace(MAC, name="box", head=True, worker=False, labels={}, memory=None)


def test_a_mac_offers_one_worker_and_no_gpu() -> None:
    command = ray_node.command(MAC, MEMBERSHIP, "python")
    assert command[:4] == ["python", "-m", "ray.scripts.scripts", "start"]
    assert {"--address=10.0.0.1:6379", "--node-ip-address=10.0.0.2", "--num-gpus=0", "--labels=a/b=c,d=e"} <= {*command}
    assert '--resources={"mlx": 1}' in command
    assert "--head" not in command
    assert "--min-worker-port=10002" in command


def test_a_head_without_a_worker_offers_none_and_sets_ray_for_all() -> None:
    command = ray_node.command(HEAD_NODE, MEMBERSHIP)
    assert {"--head", "--port=6379", "--resources={}", "--include-dashboard=true"} <= {*command}
    assert f"--dashboard-host={HEAD_NODE.address}" in command, "the job server listens on the rack's address only"
    (config,) = [option.partition("=")[2] for option in command if option.startswith("--system-config=")]
    limits = json.loads(config)
    assert limits["worker_niceness"] == 0
    lost_ms = limits["health_check_period_ms"] + limits["health_check_failure_threshold"] * (
        limits["health_check_timeout_ms"] + limits["health_check_period_ms"]
    )
    assert lost_ms <= 8000
    assert not [option for option in command if option.startswith("--address=")]


def test_cores_and_namespace_stand_before_the_command() -> None:
    command = ray_node.command(replace(MAC, cores=(0, 2), namespace="pm1"), MEMBERSHIP, "python")
    assert command[:8] == ["ip", "netns", "exec", "pm1", "taskset", "-c", "0,2", "python"]


def test_a_node_has_its_rack_s_environment_and_nothing_that_contradicts_it() -> None:
    base = {"PATH": "/bin", "RAY_ADDRESS": "elsewhere:1", "RAY_AUTH_MODE": "disabled", "POMARIUM_RACK_KEY": "secret",
            "POMARIUM_TLS": "/other", "POMARIUM_ALLOW_PLAINTEXT": "1", "POMARIUM_MACHINE_MEMORY": "1"}  # fmt: skip
    found = ray_node.environment(MAC, MEMBERSHIP, base)
    assert found["PATH"] == f"{Path(sys.executable).parent}:/bin", "a job's `python` is the rack's"
    assert (found["RAY_AUTH_MODE"], found["RAY_AUTH_TOKEN"]) == ("token", "f" * 64)
    assert found["POMARIUM_TLS"] == "/state/tls"
    assert found["POMARIUM_MACHINE_MEMORY"] == str(5 * GIB)
    assert found[MARKER] == "ab12/studio-1"
    assert not {"RAY_ADDRESS", "POMARIUM_RACK_KEY", "POMARIUM_ALLOW_PLAINTEXT"} & found.keys()
    plain = ray_node.environment(HEAD_NODE, replace(MEMBERSHIP, tls=None, plaintext=True), base)
    assert plain["POMARIUM_ALLOW_PLAINTEXT"] == "1"
    assert not {"POMARIUM_TLS", "POMARIUM_MACHINE_MEMORY"} & plain.keys()


def test_macs_may_differ_in_the_patch_of_their_python_and_in_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself judges, with the environment that its nodes and drivers get."""
    major, minor, patch = sys.version_info[:3]
    head = {"ray_version": ray.__version__, "python_version": f"{major}.{minor}.{patch + 1}"}
    monkeypatch.delenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", raising=False)
    with pytest.raises(RuntimeError, match="Version mismatch"):
        check_version_info(head, "here")
    for name, value in ray_node.environment(MAC, MEMBERSHIP, {}).items():
        monkeypatch.setenv(name, value)
    check_version_info(head, "here")
    with pytest.raises(RuntimeError, match="Version mismatch"):
        check_version_info(head | {"python_version": f"{major}.{minor + 1}.0"}, "here")
    assert MEMBERSHIP.variables().items() >= SAME_PYTHON.items(), "drivers are judged, too"


def test_a_node_s_marker_stays_on_the_node() -> None:
    assert not MARKER.startswith("POMARIUM_"), "engines would hand it on to other nodes"


def test_the_token_is_in_no_command_line_and_no_repr() -> None:
    assert "f" * 64 not in " ".join(ray_node.command(HEAD_NODE, MEMBERSHIP))
    assert "f" * 64 not in repr(MEMBERSHIP)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[Kin, "subprocess.Popen[bytes]"]]:
    """A node's processes as Ray leaves them: one hides its environment, one opened a session of its own."""
    one = Kin(MARKER, f"test-{os.getpid()}/a", tmp_path)
    sleep = "import time; time.sleep(60)"
    start = f"subprocess.Popen([sys.executable, '-c', {sleep!r}]"
    code = f"import subprocess, sys; {start}, env={{}}); {start}, start_new_session=True); {sleep}"
    environ = os.environ | {MARKER: one.value}
    first = subprocess.Popen([sys.executable, "-c", code], env=environ, start_new_session=True)
    kin.record(tmp_path, first.pid)
    deadline = time.monotonic() + 10
    while len(kin.members(one)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    yield one, first
    kin.kill(one)
    first.wait(5)


def test_all_processes_of_a_node_are_found_and_ended(family: tuple[Kin, "subprocess.Popen[bytes]"]) -> None:
    one, first = family
    assert len(kin.members(one)) == 3
    first.kill()
    first.wait(5)
    assert len(kin.members(one)) == 2, "also those whose parent is gone"
    kin.end_all([one], 1.0)
    assert kin.members(one) == []


def test_a_node_is_frozen_thawed_and_killed_as_a_whole(family: tuple[Kin, "subprocess.Popen[bytes]"]) -> None:
    one, first = family
    kin.send(one, signal.SIGSTOP)
    until(lambda: {process.status() for process in kin.members(one)} == {psutil.STATUS_STOPPED}, 90)
    kin.send(one, signal.SIGCONT)
    until(lambda: psutil.STATUS_STOPPED not in {process.status() for process in kin.members(one)}, 90)
    kin.send(one, signal.SIGSTOP)
    kin.kill(one)
    first.wait(60)
    assert kin.members(one) == []


def test_a_session_of_before_a_restart_is_not_ours(tmp_path: Path) -> None:
    one = Kin(MARKER, "gone/a", tmp_path)
    (tmp_path / kin.FILE_NAME).write_text(f"{os.getsid(0)} {psutil.boot_time() - 3600:.0f}")
    assert kin.members(one) == []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True) as other:
        kin.record(tmp_path, other.pid)  # its number was given to a process that is not marked
        assert kin.members(one) == []


def rack(tmp_path: Path, *nodes: NodeSpec) -> CurrentRack:
    return CurrentRack(MEMBERSHIP, nodes or (HEAD_NODE, MAC), tmp_path / "rack", True, Network("pm", ("pm-1",)))


def test_the_record_comes_back_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    assert current.recorded(environ) is None
    for made in (rack(tmp_path), replace(rack(tmp_path), network=None, membership=replace(MEMBERSHIP, tls=None))):
        current.save(made, environ)
        assert current.recorded(environ) == made
    assert stat.S_IMODE((tmp_path / "pomarium" / current.RECORD).stat().st_mode) == 0o600
    assert current.current(environ) is None, "none of its processes lives"
    assert current.environment(made)["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    (tmp_path / "pomarium").mkdir()
    for text in ("", "[]", '{"membership": {}}'):
        (tmp_path / "pomarium" / current.RECORD).write_text(text)
        with pytest.raises(SettingsError, match=current.RECORD):
            current.recorded(environ)


def test_what_a_restart_left_is_cleared_up(tmp_path: Path) -> None:
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    tls = tmp_path / "tls"
    left = replace(rack(tmp_path), network=None, membership=replace(MEMBERSHIP, tls=tls))
    for folder in (left.folder, tls):
        folder.mkdir()
    current.save(left, environ)
    teardown.require_none(environ)
    assert not left.folder.exists()
    assert not tls.exists()
    assert teardown.down(environ) is None


def test_simulated_macs_share_the_machine_with_the_head() -> None:
    dealt = ports.deal(tuple(range(20000, 20000 + 4 * ports.PER_NODE)))
    head, *macs = specs(Simulation(3), Path("/tmp/pm-12345678"), 16 * GIB, None, dealt)
    assert (head.name, head.worker, head.head, head.labels) == (HEAD, False, True, {})
    assert [mac.address for mac in macs] == ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    assert [mac.memory for mac in macs] == [4 * GIB] * 3
    assert len({port for one in dealt for port in (one.object_manager, one.metrics, one.agent_grpc)}) == 12
    for mac in macs:
        facts = facts_of(mac.labels)
        assert facts is not None
        assert (facts.name, facts.memory, facts.model_memory) == (mac.name, 4 * GIB, 4 * GIB - PROCESS_BYTES)
        assert len(str(mac.folder)) + RAY_SOCKET_SUFFIX <= SOCKET_PATH_LIMIT


def test_simulated_macs_take_what_is_said_of_them() -> None:
    network = netns.addresses(2, 7, "ab")
    wanted = Simulation(2, (GIB,), ((0,), (1, 2)), netns.Link())
    _, one, other = specs(wanted, Path("/tmp/x"), 9 * GIB, network, ports.deal(tuple(range(3 * ports.PER_NODE))))
    assert (one.memory, other.memory, one.cores, other.cores) == (GIB, GIB, (0,), (1, 2))
    assert (one.address, one.namespace) == ("10.213.7.11", "pmab-1")


@pytest.mark.parametrize("wanted", [(0,), (65,), (3, (GIB, GIB)), (2, (), ((0,), (0,), (0,)))])
def test_simulations_that_do_not_fit_together_are_refused(wanted: tuple[object, ...]) -> None:
    with pytest.raises(SettingsError):
        Simulation(*wanted)  # type: ignore[arg-type]


def test_a_link_s_rate_delay_and_loss_reach_the_kernel() -> None:
    assert netns.shaping(netns.Link()) == []
    (rate,) = netns.shaping(netns.Link(rate=1.25e8))
    assert rate[rate.index("rate") + 1] == "1000000000bit"
    netem, tbf = netns.shaping(netns.Link(delay_s=0.0003, rate=1e6, loss=0.001))
    assert (netem[netem.index("delay") + 1], netem[netem.index("loss") + 1]) == ("300us", "0.100000%")
    assert tbf[tbf.index("parent") + 1] == "1:"
    made = netns.commands(netns.addresses(3, 0, "ffff"), netns.Link())
    assert all(len(name) < 16 for name in netns.addresses(64, 255, "ffff").namespaces), "interface names"
    assert sum(command[:3] == ["ip", "netns", "add"] for command in made) == 3


def test_free_ports_are_free_and_different() -> None:
    found = ports.free(30)
    assert len(set(found)) == 30
    assert all(listening.is_free("", port) for port in found)


def test_a_port_in_use_is_named() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(SettingsError, match=str(port)):
            ports.require(ray_node.Ports(metrics=port))


def test_an_address_of_another_machine_is_refused() -> None:
    ports.check_local("127.0.0.1")
    with pytest.raises(SettingsError, match=r"192\.0\.2\.1"):
        ports.check_local("192.0.2.1")


def test_why_a_node_did_not_start_is_found_in_ray_s_logs(tmp_path: Path) -> None:
    assert starting.last_line("a\nConnectionError: no.\n-----\n\n") == "Ray says: ConnectionError: no"
    assert starting.aborted(tmp_path) is None
    logs = tmp_path / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (logs / "raylet.err").write_text(
        "[...] bug in Ray. Check failed: x Timed out waiting for file /tmp/port\n*** Stack"
    )
    assert starting.IMPATIENCE in (starting.aborted(tmp_path) or "")


def test_a_node_that_does_not_start_leaves_nothing_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys; print('ValueError: no such option'); sys.exit(2)"
    monkeypatch.setattr(ray_node, "command", lambda *_: [sys.executable, "-c", code])
    spec = replace(MAC, folder=tmp_path / "0")
    with pytest.raises(starting.NodeStartError, match=r"studio-1 at 10\.0\.0\.2 .*ValueError: no such option"):
        starting.bring_up([spec], MEMBERSHIP, {}, lambda _: None)
    assert kin.members(ray_node.kin_of(spec, MEMBERSHIP.session)) == []
