"""The keeper of sleeping Macs with transports that do as they are told, and what Ray's autoscaler is given to read."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler.node_launch_exception import NodeLaunchException
from ray.autoscaler.tags import TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE
from ray.autoscaler.v2.instance_manager.config import FileConfigReader

from pomarium.cluster.autoscaling import ledger, provider, setup, ssh, transport
from pomarium.cluster.autoscaling.keeper import Keeper, KnownMac, RefusedError
from pomarium.cluster.autoscaling.policy import WakePolicy
from pomarium.cluster.autoscaling.provider import RackNodeProvider
from pomarium.cluster.autoscaling.ray_config import Fleet, ray_config
from pomarium.cluster.autoscaling.transport import Agent, Ssh, transport_of
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.cluster.rack import inventory
from pomarium.cluster.rack.labels import NAME_LABEL, facts_of
from pomarium.cluster.rack.mac_power import MacPower, Power, mac_of
from pomarium.worker.errors import PomariumError, SettingsError

RACK = """
macs:
  - {name: studio-1, address: 10.0.0.11, memory: 192GiB, chip: M2 Ultra, gpu_cores: 76}
  - {name: studio-2, address: 10.0.0.12, memory: 64GiB, chip: M4 Max, gpu_cores: 40,
     hardware_address: a4:83:e7:00:00:12}
  - {name: mini-1, address: 10.0.0.13, memory: 64GiB, chip: M4 Pro, gpu_cores: 20, hardware_address: a4:83:e7:00:00:13,
     ssh_user: rack, ssh_port: 2222, program: /opt/pomarium/bin/pomarium}
head: {mac: studio-1}
sleep: {idle: 15m, always_awake: [mini-1], wake_port: 4009}
"""


class Wakes:
    """A transport that remembers what it was asked, and fails on demand."""

    def __init__(self, fault: str = "") -> None:
        self.fault, self.calls = fault, list[str]()

    def wake(self, wanted: Callable[[], bool]) -> None:
        self.calls.append("wake")
        if self.fault:
            raise PomariumError(self.fault)
        while wanted():
            time.sleep(0.01)
        self.calls.append("done")

    def retire(self) -> None:
        self.calls.append("retire")
        if self.fault:
            raise PomariumError(self.fault)


class Head:
    """Ray's head: who is alive, and what it was told."""

    def __init__(self) -> None:
        self.alive: dict[str, str] = {}
        self.told: dict[str, MacPower] = {}
        self.tellings = 0
        self.away = False

    def instances(self) -> Mapping[str, str]:
        if self.away:
            raise PomariumError("the head is away")
        return dict(self.alive)

    def publish(self, macs: Sequence[MacPower]) -> None:
        if self.away:
            raise PomariumError("the head is away")
        self.tellings += 1
        self.told |= {mac.name: mac for mac in macs}


class Clock:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 5
    while not (value := found()):
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)
    return value


def keeper_of(
    tmp_path: Path, transports: Mapping[str, Wakes | None], quiet: Sequence[tuple[int, int]] = ()
) -> tuple[Keeper, Head, Clock]:
    head, clock = Head(), Clock()
    known = {name: KnownMac(f"10.0.0.{i}", {"l": name}, way) for i, (name, way) in enumerate(transports.items())}
    keeper = Keeper(known, head, tmp_path / "macs.json", quiet, WakePolicy(30.0, 60.0, 600.0), clock)
    keeper.tick()
    return keeper, head, clock


def test_a_wake_a_life_and_a_sleep(tmp_path: Path) -> None:
    way = Wakes()
    keeper, head, clock = keeper_of(tmp_path, {"a": way})
    assert head.told["a"].state is Power.ASLEEP
    instance = keeper.ask("a")
    until(lambda: way.calls)
    assert (head.told["a"].state, head.told["a"].instance) == (Power.WAKING, instance)
    with pytest.raises(RefusedError, match="a is waking"):
        keeper.ask("a")
    head.alive["a"] = instance
    keeper.tick()
    assert head.told["a"].state is Power.AWAKE
    until(lambda: "done" in way.calls)
    keeper.retire("a.of-another-life")
    assert head.told["a"].state is Power.AWAKE
    keeper.retire(instance)
    assert head.told["a"].state is Power.RETIRING
    until(lambda: "retire" in way.calls)
    head.alive.clear()
    clock.now += 10
    keeper.tick()
    assert (head.told["a"].state, head.told["a"].instance) == (Power.ASLEEP, "")


def test_a_mac_that_cannot_be_reached_is_set_aside_with_the_reason(tmp_path: Path) -> None:
    keeper, head, clock = keeper_of(tmp_path, {"a": Wakes("no route to a"), "b": Wakes()})
    keeper.ask("a")
    told = until(lambda: (now := head.told["a"]).failures and now)
    assert (told.state, told.reason, told.not_before) == (Power.SET_ASIDE, "no route to a", clock.now + 60)
    assert not told.wakeable(clock.now)
    with pytest.raises(RefusedError, match="set aside"):
        keeper.ask("a")
    keeper.ask("b")
    clock.now += 61
    keeper.heard()
    keeper.tick()
    assert head.told["a"].state is Power.ASLEEP
    keeper.ask("a")


def test_a_restarted_head_remembers_failures_and_adopts_who_is_awake(tmp_path: Path) -> None:
    keeper, head, _ = keeper_of(tmp_path, {"a": Wakes("dead"), "b": Wakes()})
    keeper.ask("a")
    until(lambda: head.told["a"].failures)
    keeper.ask("b")
    until(lambda: ledger.load(tmp_path / "macs.json", ["b"])[0].wakes)
    again, head, _ = keeper_of(tmp_path, {"a": Wakes(), "b": Wakes()})
    assert (head.told["a"].failures, head.told["b"].wakes) == (1, 1)
    head.alive["b"] = "b.early"
    again.tick()
    assert (head.told["b"].state, head.told["b"].instance) == (Power.AWAKE, "b.early")


def test_a_head_that_does_not_answer_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    way = Wakes()
    keeper, head, _ = keeper_of(tmp_path, {"a": way})
    head.away = True
    instance = keeper.ask("a")
    until(lambda: way.calls)
    assert "the head is away" in caplog.text
    with pytest.raises(PomariumError):
        keeper.tick()
    head.away = False
    keeper.tick()
    assert (head.told["a"].state, head.told["a"].instance) == (Power.WAKING, instance)


def test_nobody_is_woken_in_quiet_hours(tmp_path: Path) -> None:
    keeper, head, clock = keeper_of(tmp_path, {"a": Wakes()}, [(0, 0)])
    with pytest.raises(RefusedError, match="quiet hours"):
        keeper.ask("a")
    told = head.told["a"]
    assert not told.wakeable(clock.now)
    assert "quiet hours" in told.reason


def test_what_does_not_change_is_told_now_and_then(tmp_path: Path) -> None:
    keeper, head, clock = keeper_of(tmp_path, {"a": Wakes()})
    before = head.tellings
    for _ in range(12):
        clock.now += 1
        keeper.tick()
    assert head.tellings - before == 2
    clock.now += 20
    with pytest.raises(PomariumError, match="autoscaler does nothing"):
        keeper.tick()
    keeper.heard()
    keeper.tick()
    assert head.tellings - before == 3


def test_a_mac_that_is_always_awake_is_woken_whenever_it_is_asleep(tmp_path: Path) -> None:
    way, head, clock = Wakes(), Head(), Clock()
    known = {"a": KnownMac("10.0.0.1", {}, way, always=True), "b": KnownMac("10.0.0.2", {}, None, always=True)}
    keeper = Keeper(known, head, tmp_path / "macs.json", (), WakePolicy(30.0, 60.0, 600.0), clock)
    keeper.tick()
    assert (head.told["a"].state, head.told["b"].state) == (Power.WAKING, Power.ASLEEP)
    head.alive["a"] = head.told["a"].instance
    keeper.tick()
    head.alive.clear()
    clock.now += 15
    keeper.heard()
    keeper.tick()
    assert (head.told["a"].state, head.told["a"].wakes) == (Power.WAKING, 2)


def test_a_mac_is_not_woken_while_it_is_put_to_sleep(tmp_path: Path) -> None:
    events = list[str]()

    class Slow(Wakes):
        def retire(self) -> None:
            events.append("retires")
            time.sleep(0.3)
            events.append("retired")

        def wake(self, wanted: Callable[[], bool]) -> None:
            events.append("wakes")

    keeper, head, clock = keeper_of(tmp_path, {"a": Slow()})
    head.alive["a"] = "a.1"
    keeper.tick()
    keeper.retire("a.1")
    until(lambda: events)
    head.alive.clear()
    clock.now += 10
    keeper.tick()
    keeper.ask("a")
    until(lambda: "wakes" in events)
    assert events == ["retires", "retired", "wakes"]


def test_a_mac_without_a_way_to_wake_it_is_refused(tmp_path: Path) -> None:
    keeper, _, _ = keeper_of(tmp_path, {"a": None})
    with pytest.raises(RefusedError, match="hardware_address"):
        keeper.ask("a")


# --- what Ray reads -------------------------------------------------------------------------------------------------


def fleet_of(text: str = RACK, head: str | None = "studio-1") -> Fleet:
    return Fleet(inventory.parse(text), head, "head.1", "10.0.0.11:6379", "0.1.0-py3.11", "/nowhere/macs.json")


def test_ray_accepts_the_file_and_finds_a_type_for_each_mac_but_the_head(tmp_path: Path) -> None:
    spec = setup.with_autoscaler(
        NodeSpec("studio-1", "10.0.0.11", tmp_path / "0", head=True),
        inventory.parse(RACK), "studio-1", "10.0.0.11:6379", tmp_path, tmp_path / "state",
    )  # fmt: skip
    assert spec.autoscaling is not None
    assert spec.autoscaling.stat().st_mode & 0o777 == 0o600
    read = FileConfigReader(str(spec.autoscaling)).get_cached_autoscaling_config()
    types = read.get_node_type_configs()
    assert set(types) == {"head", "studio-2", "mini-1"}
    assert (types["mini-1"].idle_timeout_s or 0) > 1e8
    assert types["studio-2"].idle_timeout_s is None
    assert {config.min_worker_nodes for config in types.values()} == {0}
    assert {config.max_worker_nodes for config in types.values()} == {1}
    assert types["studio-2"].resources["mlx"] == 1
    assert types["studio-2"].labels[NAME_LABEL] == "studio-2"
    facts = facts_of(types["studio-2"].labels)
    assert facts is not None
    assert (facts.memory, facts.version) == (64 << 30, setup.own_version())
    assert read.get_idle_timeout_s() == 900
    assert read.disable_node_updaters()
    assert read.get_provider_config()["head"] == {"name": "studio-1", "instance": spec.instance}


def test_a_rack_without_idle_keeps_all_awake() -> None:
    types = ray_config(fleet_of(RACK.replace("idle: 15m, ", "")))["available_node_types"]
    assert all(types[name]["idle_timeout_s"] > 1e8 for name in ("studio-2", "mini-1"))


def test_a_mac_that_would_sleep_for_good_is_refused_in_the_file() -> None:
    with pytest.raises(SettingsError, match="studio-2 would sleep and could not be woken: give its hardware_address"):
        inventory.parse(RACK.replace(",\n     hardware_address: a4:83:e7:00:00:12", ""))


def test_how_a_mac_is_reached() -> None:
    rack = inventory.parse(RACK)
    one, other = transport_of(rack.macs[1], "h:1", 4009), transport_of(rack.macs[2], "h:1", 4009)
    assert isinstance(one, Agent)
    assert (one.target.hardware_address, one.target.address, one.port) == ("a4:83:e7:00:00:12", "10.0.0.12", 4009)
    assert isinstance(other, Ssh)
    assert (other.host.login, other.host.port, other.program, other.head) == (
        "rack@10.0.0.13", 2222, "/opt/pomarium/bin/pomarium", "h:1",
    )  # fmt: skip
    with pytest.raises(PomariumError, match="studio-1 has no hardware_address"):
        transport_of(rack.macs[0], "h:1", 9)


def test_over_ssh_a_mac_is_told_to_join_and_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    way = transport_of(inventory.parse(RACK).macs[2], "10.0.0.11:6379", 9)
    sent, run, up = [], list[list[str]](), iter([False, False, True, True, False])
    monkeypatch.setattr(transport, "PACKET_S", 0.0)
    monkeypatch.setattr(transport.wake_on_lan, "send", lambda target, port: sent.append((target.address, port)))
    monkeypatch.setattr(ssh, "answers", lambda host, timeout_s: next(up))
    monkeypatch.setattr(ssh, "run", lambda host, remote, timeout_s: run.append(list(remote)) or "")
    monkeypatch.setattr(ssh, "run_and_part", lambda host, remote, timeout_s: run.append(list(remote)))
    way.wake(lambda: True)
    way.retire()
    assert sent == [("10.0.0.13", 9)] * 2
    program = "/opt/pomarium/bin/pomarium"
    join, down, asleep = run
    assert join[:2] == ["/bin/sh", "-c"]
    assert join[2].startswith("/usr/bin/caffeinate -u -t 30 ")
    assert join[4:] == [program, "rack", "join", "10.0.0.11:6379"]
    assert (down, asleep) == ([program, "rack", "down"], ["sudo", "-n", "/usr/bin/pmset", "sleepnow"])


class StillHead(Head):
    def __init__(self, address: str) -> None:
        super().__init__()
        assert address == "10.0.0.11:6379"


def test_the_provider_lists_who_is_there_and_refuses_as_ray_expects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "Head", StillHead)
    monkeypatch.setattr(Keeper, "start", lambda self: None)
    way = Wakes()
    monkeypatch.setattr(provider, "transport_of", lambda entry, head, port: way)
    config = ray_config(fleet_of())["provider"] | {"record": str(tmp_path / "macs.json")}
    found = RackNodeProvider(config, "pomarium")
    head, kept_awake = found.non_terminated_nodes({})
    assert (head, mac_of(kept_awake)) == ("head.1", "mini-1")
    found.create_node_with_resources_and_labels({}, {TAG_RAY_USER_NODE_TYPE: "studio-2", "x": "y"}, 1, {}, {})
    head, _, instance = found.non_terminated_nodes({})
    assert found.is_running(head)
    assert not found.is_running(instance)
    assert found.node_tags(instance)["x"] == "y"
    assert found.non_terminated_nodes({TAG_RAY_NODE_KIND: "worker"}) == [kept_awake, instance]
    assert found.internal_ip(instance) == "10.0.0.12"
    with pytest.raises(NodeLaunchException, match="studio-2 is waking"):
        found.create_node_with_resources_and_labels({}, {TAG_RAY_USER_NODE_TYPE: "studio-2"}, 1, {}, {})
    found.terminate_node(instance)
    until(lambda: "retire" in way.calls)
    assert not found.is_terminated(instance)
