"""What `pomarium rack status` makes of Ray's nodes and the replicas' reports."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.rack import reports, status
from pomarium.cluster.rack.labels import MacFacts, labels_of
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.cluster.rack.reports import LinkReport, LossReport, ReplicaReport, StageReport, WaitingReport
from pomarium.cluster.rack.roster import Member, members, namesake
from pomarium.cluster.rack.serve_actors import CONTROLLER, ENGINE, INGRESS, ServeActor
from pomarium.cluster.rack.status import RackStatus

GIB = 1 << 30
VERSION = "0.1.0-py3.11"
FACTS = MacFacts("mac-1", "M2 Ultra", 192 * GIB, 128 * GIB, 6e11, 1e13, VERSION)
ONE = Member("mac-1", "10.0.0.1", True, True, FACTS)
TWO = Member("mac-2", "10.0.0.2", True, False, replace(FACTS, name="mac-2"))
LOST = replace(TWO, alive=False)
HEAD = Member("box", "10.0.0.9", True, True, None)
LINKS = (LinkReport("mac-1", "mac-2", 1.25e9, None),)
STAGES = (StageReport("mac-1", 0, 20, 7, 2 * GIB), StageReport("mac-2", 20, 30, 8, GIB))
REPORT = ReplicaReport("smollm2", "r1", 30, STAGES, LINKS, 12.5, 3, 1, 40.0, 0.25, 0.5, 1000.0)


def test_a_node_that_rejoined_counts_once() -> None:
    assert members([(ONE, False), (LOST, False), (TWO, False)]) == (ONE, TWO)
    assert members([(TWO, False), (LOST, False)]) == (TWO,), "whatever the order"


def test_a_lost_mac_stays_and_one_that_left_does_not() -> None:
    assert members([(LOST, False), (ONE, False)]) == (ONE, LOST)
    assert members([(LOST, True), (ONE, False)]) == (ONE,)
    assert members([(LOST, False), (LOST, True)]) == ()
    assert members([(LOST, True), (TWO, False)]) == (TWO,)


def test_a_name_is_taken_by_a_live_node_only() -> None:
    assert namesake("mac-2", [ONE, TWO]) is TWO
    assert namesake("mac-2", [ONE, LOST]) is None


@given(
    st.builds(
        ReplicaReport,
        st.text(), st.text(), st.integers(0, 200),
        st.lists(st.builds(StageReport, st.text(), *[st.integers(0, 1 << 50)] * 4), max_size=3).map(tuple),
        st.lists(
            st.builds(LinkReport, st.text(), st.text(), *[st.none() | st.floats(0, 1e12)] * 2), max_size=2
        ).map(tuple),
        st.floats(0, 1e6), st.integers(0, 999), st.integers(0, 999),
        st.floats(0, 1e6), st.floats(0, 1), st.floats(0, 1), st.floats(0, 4e9),
    )
)  # fmt: skip
def test_reports_survive_json(report: ReplicaReport) -> None:
    assert reports.decode(reports.encode(report)) == report


@given(st.builds(LossReport, st.text(), st.text(), st.text(), st.floats(0, 4e9)))
def test_reports_of_losses_survive_json(report: LossReport) -> None:
    assert reports.decode_loss(reports.encode(report)) == report


@given(st.builds(WaitingReport, st.text(), st.text(), st.text(), st.floats(0, 4e9)))
def test_reports_of_waiting_survive_json(report: WaitingReport) -> None:
    assert reports.decode_waiting(reports.encode(report)) == report


def test_a_silent_replica_is_gone() -> None:
    later = replace(REPORT, replica="r0", written=1010.0)
    assert reports.fresh([REPORT, later], 1015.0) == (later, REPORT)
    assert reports.fresh([REPORT, later], 1015.1) == (later,)


def test_the_table_shows_macs_stages_and_replicas() -> None:
    text = status.text(RackStatus("10.0.0.9:6379", False, (HEAD, ONE, LOST), (REPORT,), VERSION))
    lines = text.splitlines()
    assert lines[0] == "rack at 10.0.0.9:6379: 1 of 2 Macs alive"
    assert "runs no stages" in lines[3]
    assert "M2 Ultra" in lines[4]
    assert "smollm2 0-19 of 30, 2 GiB" in lines[4]
    assert "lost" in lines[5]
    assert lines[-1].split() == ["smollm2", "r1", "0-19", "on", "mac-1,", "20-29", "on", "mac-2", "3", "GiB",
                                 "3", "1", "12.5"]  # fmt: skip
    assert "no model is served" in status.text(RackStatus("a:1", True, (ONE,), (), VERSION))


ACTORS = (
    ServeActor(CONTROLLER, alive=True),
    ServeActor(INGRESS, "ingress", "i1", alive=True),
    ServeActor(ENGINE, "engine:smollm2", "r1", alive=True),
)


def test_a_replica_whose_process_has_ended_does_not_serve() -> None:
    """Its last report is seconds old."""
    whole = RackStatus("a:1", False, (ONE, TWO), (REPORT,), VERSION, actors=ACTORS)
    assert (whole.serving, whole.missing) == ((REPORT,), ())
    lost = replace(whole, actors=(*ACTORS[:2], replace(ACTORS[2], alive=False, end="it was killed")))
    assert lost.serving == ()
    text = status.text(lost)
    assert "r1" not in text
    assert "no model is served" not in text
    assert text.endswith("\n\nthe endpoint does not serve: the engine of smollm2 was lost: it was killed")
    document = status.document(lost)
    assert document["replicas"] == []
    assert document["missing"] == [{"what": "the engine of smollm2", "why": "it was killed", "coming": False}]
    assert all(mac["stages"] == [] for mac in document["macs"])  # type: ignore[attr-defined]


def test_the_engines_of_a_batch_job_are_none_of_serves() -> None:
    job = replace(REPORT, replica="job#0")
    assert RackStatus("a:1", False, (ONE,), (job,), VERSION, actors=ACTORS[:2]).serving == (job,)


def test_a_replica_that_waits_says_for_what() -> None:
    waiting = (WaitingReport("big", "r2", "3 stages need 3 Macs and there are 1", 1000.0),)
    alone = RackStatus("a:1", False, (ONE,), (), VERSION, waiting)
    assert status.text(alone).endswith("\n\nbig waits for Macs: 3 stages need 3 Macs and there are 1")
    reason = "3 stages need 3 Macs and there are 1"
    assert status.document(alone)["waiting"] == [
        {"model": "big", "replica": "r2", "reason": reason, "written": 1000.0, "waking": False}
    ]
    beside = status.text(RackStatus("a:1", False, (ONE,), (REPORT,), VERSION, waiting))
    assert "smollm2" in beside
    assert "big waits for Macs" in beside


def test_the_document_is_json_in_bytes() -> None:
    found = status.document(RackStatus("10.0.0.9:6379", True, (HEAD, ONE, TWO), (REPORT,), VERSION))
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found))
    first, second = found["macs"]  # type: ignore[misc]
    assert (first["name"], first["memory"], first["stages"][0]["end"]) == ("mac-1", 192 * GIB, 20)
    assert second["stages"][0]["replica"] == "r1"


def test_a_mac_that_runs_another_version_is_said_to_be_left_out() -> None:
    text = status.text(RackStatus("10.0.0.9:6379", False, (HEAD, ONE), (REPORT,), "0.2.0-py3.11"))
    assert "alive, head, runs 0.1.0-py3.11: left out" in text


def test_a_machine_of_a_ray_that_is_no_rack_is_shown_if_it_runs_stages() -> None:
    """As of `pomarium serve` on one machine, whose node is no Mac of any rack."""
    report = replace(REPORT, stages=(StageReport("127.0.0.1", 0, 30, 7, GIB),))
    here, other = Member("node", "127.0.0.1", True, True, None), Member("node", "10.0.0.7", True, False, None)
    found = RackStatus("127.0.0.1:6379", False, (here, other), (report,), VERSION, at=7.0, memory=24 * GIB)
    document = status.document(found)
    (host,) = document["macs"]  # type: ignore[misc]
    assert (host["name"], host["state"], host["stages"][0]["memory"]) == ("127.0.0.1", "alive", GIB)
    assert (host["memory"], "chip" in host) == (24 * GIB, False)
    assert (document["at"], document["version"]) == (7.0, VERSION)
    assert found.macs == (), "nor is it one that a plan could count on"


def test_why_a_mac_is_set_aside_is_in_the_document() -> None:
    away = MacPower("mac-2", "10.0.0.2", Power.SET_ASIDE, 0.0, reason="it did not wake", labels=labels_of(TWO.facts))
    document = status.document(RackStatus("a:1", False, (ONE,), (), VERSION, powers=(away,)))
    assert [(mac["name"], mac["state"], mac["reason"]) for mac in document["macs"]] == [  # type: ignore[attr-defined]
        ("mac-1", "alive", None),
        ("mac-2", "set aside", "it did not wake"),
    ]
