"""A Mac's agent: what it does in each situation."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.autoscaling import agent
from pomarium.cluster.autoscaling.agent import Agent, Sight, Step, decide
from pomarium.cluster.autoscaling.sleep import SleepRefusedError
from pomarium.cluster.node import starting
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_node import NodeSpec
from pomarium.cluster.node.starting import NodeStartError
from pomarium.cluster.rack.mac_power import MacPower, Power, instance_for


def told(state: Power, instance: str = "m.1") -> MacPower:
    return MacPower("m", "10.0.0.1", state, 1.0, instance=instance)


@pytest.mark.parametrize(
    ("sight", "step"),
    [
        (Sight(True, "m.1", True, told(Power.AWAKE)), Step.STAY),
        (Sight(True, "", True), Step.STAY),
        (Sight(True, "m.1", False), Step.STAY),
        (Sight(False, "m.1", False), Step.WAIT),
        (Sight(False, "", True), Step.JOIN),
        (Sight(False, "m.1", True, told(Power.AWAKE)), Step.JOIN),
        (Sight(False, "m.1", True, told(Power.AWAKE), drained=True), Step.SLEEP),
        (Sight(True, "m.1", True, told(Power.AWAKE), stranger=True), Step.JOIN),
        (Sight(True, "m.1", True, told(Power.RETIRING)), Step.SLEEP),
        (Sight(False, "m.1", True, told(Power.RETIRING)), Step.SLEEP),
        (Sight(False, "m.2", True, told(Power.RETIRING)), Step.JOIN),
        (Sight(False, "", True, told(Power.WAKING, "m.2")), Step.JOIN),
        (Sight(False, "", True, let_go=True), Step.STAY_AWAY),
        (Sight(False, "", False, let_go=True), Step.WAIT),
        (Sight(True, "", True, let_go=True), Step.STAY),
    ],
)
def test_what_follows_from_what_is_seen(sight: Sight, step: Step) -> None:
    assert decide(sight) is step


@given(st.booleans(), st.sampled_from(["", "m.1", "m.2"]), st.booleans(),
       st.none() | st.builds(told, st.sampled_from(list(Power)), st.sampled_from(["", "m.1", "m.2"])),
       st.booleans(), st.booleans())  # fmt: skip
def test_a_running_node_is_ended_only_by_order(
    runs: bool, instance: str, head: bool, power: MacPower | None, drained: bool, stranger: bool
) -> None:
    step = decide(Sight(runs, instance, head, power, drained, stranger))
    if runs and step is not Step.STAY and not (stranger and step is Step.JOIN):
        assert power is not None
        assert (power.state, power.instance) == (Power.RETIRING, instance)
    if not runs and not head and (power is None or power.state is not Power.RETIRING):
        assert step is Step.WAIT


class Head:
    def __init__(self) -> None:
        self.there, self.power, self.idle, self.began, self.unready = True, None, False, "s1", False
        self.by_hand = False

    power: MacPower | None

    def answers(self) -> bool:
        return self.there

    def session(self) -> str:
        return self.began

    def told(self, name: str) -> MacPower | None:
        return self.power

    def instance(self, name: str) -> str | None:
        if self.unready:
            return None
        return "" if self.power is None else instance_for(name, self.power)

    def drained(self, instance: str) -> bool:
        return self.idle

    def let_go(self, name: str) -> bool:
        return self.by_hand


@pytest.fixture
def rack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> "Rack":
    return Rack(tmp_path, monkeypatch)


class Rack:
    """An agent whose nodes are names in a list."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.head, self.started, self.said, self.slept, self.paused = Head(), list[str](), list[str](), 0, list[float]()
        self.fault: str | None = None
        monkeypatch.setattr(starting, "bring_up", self._bring_up)
        monkeypatch.setattr(agent.time, "sleep", self.paused.append)
        self.refusal: str | None = None
        self.roused = list[int]()
        spec = NodeSpec("m", "127.0.0.9", tmp_path / "0")
        membership = Membership("none-such", "127.0.0.9:1", "token")
        self.agent = Agent(spec, membership, self.head, {}, self._asleep, self.said.append, rouse=self._rouse)

    def _bring_up(self, specs: list[NodeSpec], membership: Membership, environ: Mapping[str, str], say: object) -> None:
        if self.fault:
            raise NodeStartError(self.fault)
        self.started.append(specs[0].instance)

    def _asleep(self) -> None:
        if self.refusal:
            raise SleepRefusedError(self.refusal)
        self.slept += 1

    def _rouse(self) -> None:
        self.roused.append(len(self.started))


def test_a_woken_mac_joins_as_what_it_was_woken_as(rack: Rack) -> None:
    rack.head.power = told(Power.WAKING, "m.77")
    assert rack.agent.step() is Step.JOIN
    assert rack.started == ["m.77"]


def test_a_node_that_ended_is_started_again_under_a_new_name(rack: Rack) -> None:
    rack.head.power = told(Power.ASLEEP, "")
    rack.agent.step()
    rack.agent.step()
    one, other = rack.started
    assert one != other
    assert one.startswith("m.")
    assert any(line.endswith("joining again") for line in rack.said)


def test_one_that_was_drained_for_being_idle_is_the_order_to_sleep(rack: Rack) -> None:
    rack.head.power = told(Power.AWAKE)
    rack.agent.step()
    rack.head.idle = True
    assert rack.agent.step() is Step.SLEEP
    assert rack.slept == 1
    rack.head.idle = False
    assert rack.agent.step() is Step.JOIN


def test_it_joins_once_the_head_knows_what_to_call_it(rack: Rack) -> None:
    rack.head.unready = True
    assert [rack.agent.step() for _ in range(3)] == [Step.JOIN] * 3
    assert rack.started == []
    rack.head.unready, rack.head.power = False, told(Power.WAKING, "m.5")
    rack.agent.step()
    assert rack.started == ["m.5"]


def test_without_a_head_it_waits(rack: Rack) -> None:
    rack.head.there = False
    assert [rack.agent.step() for _ in range(3)] == [Step.WAIT] * 3
    assert rack.started == []


def test_a_start_that_fails_is_tried_again_ever_more_slowly(rack: Rack) -> None:
    rack.fault = "the disk is full"
    for _ in range(8):
        rack.agent.step()
    assert rack.paused == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert all("the disk is full" in line for line in rack.said)
    rack.fault = None
    rack.agent.step()
    assert rack.started == [""]


def test_a_mac_that_is_not_let_sleep_says_why_and_joins_again_at_once(rack: Rack) -> None:
    rack.head.power = told(Power.AWAKE)
    rack.agent.step()
    rack.head.idle, rack.refusal = True, "`pmset sleepnow` ended with 77: Sleep error"
    assert rack.agent.step() is Step.SLEEP
    assert rack.said[-1] == "`pmset sleepnow` ended with 77: Sleep error; joining again"
    assert rack.agent.step() is Step.JOIN
    assert (len(rack.started), rack.paused) == (2, [])


def test_a_woken_mac_is_roused_before_anything_else(rack: Rack) -> None:
    rack.head.power = told(Power.AWAKE)
    rack.agent.step()
    assert rack.roused == [0], "before it joined"
    rack.head.idle, rack.head.there = True, True
    rack.agent.step()
    assert rack.roused == [0, 1]


def test_a_mac_that_was_drained_stays_away_until_that_is_taken_back(rack: Rack) -> None:
    rack.head.by_hand = True
    assert rack.agent.step() is Step.JOIN, "an agent that is started anew joins"
    assert [rack.agent.step() for _ in range(3)] == [Step.STAY_AWAY] * 3
    assert [line for line in rack.said if "drained" in line] == [
        "this Mac was drained, and its node has ended; `pomarium rack undrain` lets it join again"
    ]
    rack.head.by_hand = False
    assert rack.agent.step() is Step.JOIN
