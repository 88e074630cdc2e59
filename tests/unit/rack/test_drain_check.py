"""Which Macs can be drained, what they hold, and how `rack status` shows it."""

from dataclasses import replace

import pytest

from pomarium.cluster.executor.staging import without_drained
from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.placement.model import Mac
from pomarium.cluster.rack import drain_check, status
from pomarium.cluster.rack.drains import Drain
from pomarium.cluster.rack.labels import MacFacts
from pomarium.cluster.rack.reports import ReplicaReport, StageReport
from pomarium.cluster.rack.roster import Member
from pomarium.cluster.rack.serve_actors import ENGINE, ServeActor
from pomarium.cluster.rack.status import RackStatus

VERSION = "0.1.0-py3.11"
HEAD = Member("box", "10.0.0.9", True, True, None, node="n0")


def mac(number: int) -> Member:
    facts = MacFacts(f"mac-{number}", "M2 Ultra", 1 << 37, 1 << 36, 6e11, 1e13, VERSION)
    return Member(facts.name, f"10.0.0.{number}", True, False, facts, node=f"n{number}")


def engine(replica: str, *macs: int, model: str = "m", least: int = 1) -> ReplicaReport:
    stages = tuple(StageReport(f"mac-{number}", 0, 1, 7, 1) for number in macs)
    return ReplicaReport(model, replica, 1, stages, (), 0.0, 0, 0, 0.0, 0.0, 0.0, 1000.0, least)


def rack(*replicas: ReplicaReport, macs: int = 3) -> RackStatus:
    return RackStatus("a:1", False, (HEAD, *map(mac, range(1, macs + 1))), replicas, VERSION)


@pytest.mark.parametrize(
    "found",
    [
        rack(),
        rack(engine("r1", 1), engine("r2", 2)),
        rack(engine("r1", 2), engine("r2", 3)),
        rack(engine("r1", 1)),
        rack(engine("r1", 1, 2, least=1)),
        rack(engine("r1", 1, 2, least=2)),
        rack(engine("r1", 1, 2, least=2), engine("r2", 3, 4, least=2), macs=4),
        replace(rack(engine("r1", 1), engine("r2", 2)), drains=(Drain("mac-1", "n1"),)),
    ],
)
def test_a_mac_whose_answers_can_go_on_is_let_go(found: RackStatus) -> None:
    assert drain_check.refusal("mac-1", found) is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (rack(engine("r1", 1), macs=1), "takes 1 Mac(s) where 0 would be free"),
        (rack(engine("r1", 1, 2, 3, least=3)), "takes 3 Mac(s) where 2 would be free"),
        (rack(engine("r1", 1), engine("r2", 2, model="other"), macs=2), "mac-1 holds m"),
        (replace(rack(engine("r1", 1), engine("r2", 2), macs=2), drains=(Drain("mac-2", "n2"),)), "mac-1 holds m"),
        (replace(rack(), members=(HEAD, replace(mac(1), head=True))), "mac-1 is the rack's head"),
        (replace(rack(), members=(replace(HEAD, autoscaler=True), mac(1))), "take it out of rack.yaml"),
        (replace(rack(), members=(HEAD, replace(mac(1), alive=False))), "mac-1 is lost"),
        (replace(rack(), members=(HEAD, replace(mac(1), alive=False, drained=True))), "mac-1 is drained"),
        (replace(rack(), members=(HEAD, mac(2))), "There is no Mac 'mac-1' in the rack: it has mac-2."),
        (replace(rack(), members=(HEAD,)), "it has none."),
    ],
)
def test_another_is_refused_in_a_sentence(found: RackStatus, said: str) -> None:
    refused = drain_check.refusal("mac-1", found)
    assert refused is not None
    assert said in refused
    assert refused.endswith(".")


def test_the_last_engine_goes_when_another_serves_if_it_can() -> None:
    one, two, three = engine("r1", 1), engine("r2", 2), engine("r3", 3)
    process = (ServeActor(ENGINE, "engine:m", "r2", alive=True, node="n1"),)
    assert drain_check.spared(mac(1), rack(one, two)) == ()
    assert drain_check.spared(mac(1), replace(rack(one, two), actors=process)) == ("r2",)
    assert drain_check.spared(mac(1), replace(rack(two), actors=process)) == ("r2",)
    assert drain_check.spared(mac(1), replace(rack(two, three), actors=process)) == ()
    assert drain_check.spared(mac(1), rack(one)) == (), "it cannot"


def test_with_time_another_engine_has_to_take_what_comes() -> None:
    two = rack(engine("r1", 1), engine("r2", 2))
    assert drain_check.refusal("mac-1", two, wait=True) is None
    for found in (rack(engine("r1", 1)), rack(engine("r1", 1), engine("r2", 2, model="other"))):
        assert drain_check.refusal("mac-1", found) is None
        assert "leave --wait out" in (drain_check.refusal("mac-1", found, wait=True) or "")
    process = ServeActor(ENGINE, "engine:m", "r2", alive=True, node="n1")
    assert "only engine of m" in (drain_check.refusal("mac-1", replace(two, actors=(process,)), wait=True) or "")


def test_a_mac_of_another_version_is_no_place_to_go() -> None:
    facts = mac(2).facts
    assert facts is not None
    other = replace(mac(2), facts=replace(facts, version="0.0.9-py3.11"))
    found = replace(rack(engine("r1", 1)), members=(HEAD, mac(1), other))
    assert "0 would be free" in (drain_check.refusal("mac-1", found) or "")


def test_a_mac_holds_stages_and_the_processes_of_engines() -> None:
    one = ServeActor(ENGINE, "engine:m", "r1", alive=True, node="n3")
    actors = (one, replace(one, replica="r0", alive=False), replace(one, replica="r2", node="n0"))
    found = replace(rack(engine("r1", 1), engine("r2", 2)), actors=actors)
    assert [drain_check.held(mac(number), found) for number in (1, 2, 3)] == [("r1",), ("r2",), ("r1",)]


def test_status_tells_of_it() -> None:
    found = replace(rack(engine("r1", 1)), drains=(Drain("mac-1", "n1"), Drain("mac-2", "an earlier node")))
    assert [found.state_of(one) for one in found.macs] == ["draining", "alive", "alive"]
    gone = replace(found, members=(HEAD, replace(mac(1), alive=False, drained=True), mac(2)), replicas=())
    assert [gone.state_of(one) for one in gone.macs] == ["drained", "alive"]
    assert gone.lost == ()
    assert drain_check.freed("mac-1", gone)
    assert not drain_check.freed("mac-1", found)
    assert "1 of 2 Macs alive" in status.text(gone)
    assert "drained" in status.text(gone)


def test_nothing_is_placed_on_a_mac_that_is_drained() -> None:
    nodes = [RackNode(f"n{number}", "", Mac(f"mac-{number}", 1, 1.0, 1.0), 1, 1, False) for number in (1, 2)]
    assert without_drained(nodes, [Drain("mac-1", "n9")]) == (tuple(nodes), "")
    left, said = without_drained(nodes, [Drain("mac-1", "n1")])
    assert left == (nodes[1],)
    assert said == "Left out: mac-1, which is being drained."
