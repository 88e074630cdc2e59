"""The states of Macs that sleep: each way through them, and what holds whatever happens."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.autoscaling import fleet, ledger
from pomarium.cluster.autoscaling.fleet import LOST_S, RETIRE_S, FleetMac
from pomarium.cluster.autoscaling.policy import Tries, WakePolicy
from pomarium.cluster.rack import power_states
from pomarium.cluster.rack.mac_power import MacPower, Power, decode, encode, fresh, instance_for, mac_of, new_instance
from pomarium.cluster.rack.roster import Member
from pomarium.worker.errors import SettingsError

POLICY = WakePolicy(deadline_s=30.0, first_pause_s=60.0, longest_pause_s=600.0)


def waking(now: float = 0.0) -> FleetMac:
    return fleet.ask(FleetMac("m"), now, "m.1")


def awake(now: float = 0.0) -> FleetMac:
    return fleet.observe(waking(now), "m.1", now, POLICY)


def test_a_mac_wakes_and_is_counted() -> None:
    mac = fleet.observe(waking(), None, 29.0, POLICY)
    assert (mac.state, mac.instance) == (Power.WAKING, "m.1")
    mac = fleet.observe(mac, "m.1", 29.5, POLICY)
    assert (mac.state, mac.instance, mac.wakes, mac.since) == (Power.AWAKE, "m.1", 1, 29.5)


def test_one_that_does_not_wake_is_set_aside_and_says_why() -> None:
    mac = fleet.observe(waking(), None, 30.0, POLICY)
    assert (mac.state, mac.instance) == (Power.ASLEEP, "")
    assert mac.tries == Tries(1, 90.0)
    assert "did not join within 30 s" in mac.reason
    assert fleet.shown(mac, 89.0) is Power.SET_ASIDE
    assert fleet.shown(mac, 90.0) is Power.ASLEEP
    assert "set aside" in (fleet.refusal(mac, 89.0, 0.0) or "")
    assert fleet.refusal(mac, 90.0, 0.0) is None
    again = fleet.observe(fleet.ask(mac, 100.0, "m.2"), None, 130.0, POLICY)
    assert again.tries == Tries(2, 250.0)


def test_one_that_wakes_late_is_taken_all_the_same() -> None:
    late = fleet.observe(fleet.observe(waking(), None, 30.0, POLICY), "m.1", 40.0, POLICY)
    assert (late.state, late.tries, late.reason) == (Power.AWAKE, Tries(), "")


def test_one_that_was_woken_by_hand_is_adopted() -> None:
    mac = fleet.observe(FleetMac("m"), "m.hand", 5.0, POLICY)
    assert (mac.state, mac.instance, mac.wakes) == (Power.AWAKE, "m.hand", 0)


def test_one_that_is_told_to_sleep_sleeps_once_its_node_is_gone() -> None:
    mac = fleet.retire(awake(), 10.0)
    assert fleet.observe(mac, "m.1", 100.0, POLICY).state is Power.RETIRING
    assert fleet.observe(mac, None, 10.0 + RETIRE_S - 0.1, POLICY).state is Power.RETIRING
    asleep = fleet.observe(mac, None, 10.0 + RETIRE_S, POLICY)
    assert (asleep.state, asleep.instance) == (Power.ASLEEP, "")
    assert fleet.retire(asleep, 20.0) == asleep


def test_one_that_comes_again_while_it_was_to_sleep_is_awake() -> None:
    assert fleet.observe(fleet.retire(awake(), 10.0), "m.2", 11.0, POLICY).state is Power.AWAKE


def test_a_lost_node_is_waited_for_a_little() -> None:
    mac = fleet.observe(awake(), "m.1", 50.0, POLICY)
    assert fleet.observe(mac, None, 50.0 + LOST_S - 0.1, POLICY).state is Power.AWAKE
    lost = fleet.observe(mac, None, 50.0 + LOST_S, POLICY)
    assert (lost.state, lost.reason) == (Power.ASLEEP, "its node was lost")
    assert fleet.refusal(lost, 50.0 + LOST_S, 0.0) is None


def test_nobody_is_woken_in_quiet_hours_or_twice() -> None:
    assert "quiet hours" in (fleet.refusal(FleetMac("m"), 5.0, 6.0) or "")
    assert fleet.refusal(FleetMac("m"), 6.0, 6.0) is None
    for mac in (waking(), awake(), fleet.retire(awake(), 1.0)):
        assert fleet.refusal(mac, 2.0, 0.0) == f"m is {mac.state}"


class Events:
    ASK, RETIRE, NODE, OTHER_NODE, NO_NODE, GIVE_UP = range(6)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0.0, 100.0)), max_size=40))
def test_whatever_happens(events: list[tuple[int, float]]) -> None:
    """An instance is there exactly while the Mac is not asleep; a live node is never taken for asleep; a wake ends."""
    mac, now, asked = FleetMac("m"), 0.0, 0
    for event, passed in events:
        now += passed
        if event == Events.ASK and fleet.refusal(mac, now, 0.0) is None:
            asked += 1
            mac = fleet.ask(mac, now, f"m.{asked}")
        elif event == Events.RETIRE:
            mac = fleet.retire(mac, now)
        elif event == Events.GIVE_UP and mac.state is Power.WAKING:
            mac = fleet.give_up(mac, now, "no", POLICY)
        elif event in (Events.NODE, Events.OTHER_NODE, Events.NO_NODE):
            node = {Events.NODE: mac.instance or "m.by-hand", Events.OTHER_NODE: "m.other"}.get(event)
            mac = fleet.observe(mac, node, now, POLICY)
            if node is not None:
                assert mac.state in (Power.AWAKE, Power.RETIRING)
                assert mac.instance == node
            assert mac.state is not Power.WAKING or now - mac.since < POLICY.deadline_s
        assert bool(mac.instance) == (mac.state is not Power.ASLEEP)
        assert mac.wakes == asked
        assert mac.state is not Power.AWAKE or mac.tries == Tries()
        assert mac.since <= now


def test_instances_name_their_mac_and_are_new() -> None:
    one, other = new_instance("studio-1.local"), new_instance("studio-1.local")
    assert one != other
    assert mac_of(one) == mac_of(other) == "studio-1.local"


def told(state: Power, **more: float) -> MacPower:
    return MacPower("m", "10.0.0.1", state, 1.0, instance="m.1", labels={"a": "b"}, **more)  # type: ignore[arg-type]


def test_a_node_takes_the_instance_that_it_was_woken_as() -> None:
    assert instance_for("m", told(Power.WAKING)) == "m.1"
    for state in (Power.ASLEEP, Power.AWAKE, Power.RETIRING, Power.SET_ASIDE):
        assert mac_of(instance_for("m", told(state))) == "m"
        assert instance_for("m", told(state)) != "m.1"


@pytest.mark.parametrize("state", list(Power))
def test_what_is_told_is_read_back_while_it_is_fresh(state: Power) -> None:
    mac = told(state, written=100.0)
    assert decode(encode(mac)) == mac
    assert fresh([mac], 120.0) == (mac,)
    assert fresh([mac], 120.1) == ()


def test_who_can_be_woken() -> None:
    assert [state for state in Power if told(state).wakeable(10.0)] == [Power.ASLEEP, Power.WAKING, Power.RETIRING]
    assert not told(Power.ASLEEP, not_before=10.5).wakeable(10.0)
    assert told(Power.WAKING, not_before=10.5).wakeable(10.0), "quiet hours do not end a wake that has begun"


def test_what_a_newer_head_tells_is_understood() -> None:
    mac = told(Power.ASLEEP)
    assert decode(encode(mac)[:-1] + b', "colour": "red"}') == mac


def test_who_joins_is_called_as_the_autoscaler_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[bytes, bytes] = {}
    monkeypatch.setattr(power_states.internal_kv, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(power_states.internal_kv, "_internal_kv_list", lambda prefix, namespace: list(kept))
    plain = Member("head", "10.0.0.9", True, True, None)
    sleeping = replace(plain, autoscaler=True)
    assert power_states.instance_of("m", []) is None
    assert power_states.instance_of("m", [replace(sleeping, alive=False)]) is None
    assert power_states.instance_of("m", [plain]) == ""
    assert power_states.instance_of("m", [sleeping]) is None, "its autoscaler has said nothing yet"
    kept[b"mac:m"] = encode(told(Power.WAKING, written=0.0))
    assert power_states.instance_of("m", [sleeping]) == "m.1"
    with pytest.raises(SettingsError, match="does not name other"):
        power_states.instance_of("other", [sleeping])


def test_the_ledger_remembers_failures_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "macs.json"
    failed = fleet.observe(waking(), None, 30.0, POLICY)
    ledger.save(path, [failed, awake(7.0)])
    (found, fresh_one) = ledger.load(path, ["m", "new"])
    assert (found.name, found.wakes, found.state, found.instance) == ("m", 1, Power.ASLEEP, "")
    assert fresh_one == FleetMac("new")
    ledger.save(path, [failed])
    assert ledger.load(path, ["m"])[0] == failed


@pytest.mark.parametrize("text", ["", "[]", "{", '{"m": 3}', '{"m": {"failures": "x"}}', '{"m": {}}'])
def test_a_damaged_ledger_is_told_and_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    path = tmp_path / "macs.json"
    path.write_text(text)
    assert ledger.load(path, ["m"]) == (FleetMac("m"),)
    assert "begins anew" in caplog.text
