"""`pomarium rack drain` and `undrain`: in which order what is told, what is printed, what is refused. The rack is a
stub; tests/rack/test_rack_failover.py has a real one."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pomarium.cluster.cli import main, rack_drain
from pomarium.cluster.rack import drain_check, drains, simulate
from pomarium.cluster.rack.drains import Drain
from pomarium.cluster.rack.labels import MacFacts
from pomarium.cluster.rack.reports import ReplicaReport, StageReport
from pomarium.cluster.rack.roster import Member
from pomarium.cluster.rack.status import RackStatus

FACTS = MacFacts("mac-1", "M2 Ultra", 1 << 37, 1 << 36, 6e11, 1e13, "1")
MACS = tuple(
    Member(f"mac-{n}", f"10.0.0.{n}", True, False, replace(FACTS, name=f"mac-{n}"), node=f"n{n}") for n in (1, 2)
)
STAGE = StageReport("mac-1", 0, 1, 7, 1)
ENGINE = ReplicaReport("m", "r1", 1, (STAGE,), (), 0.0, 0, 0, 0.0, 0.0, 0.0, 1.0)


class Rack:
    """Two Macs, an engine on the first. It leaves `stays` looks after it was told, and its node ends behind that.

    Attributes:
        done: what was told to whom, in order. accepts: whether Ray takes a drain.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Any] = []
        self.status = RackStatus("a:1", True, MACS, (ENGINE,), "1")
        self.stays, self.accepts, self.simulated = 2, True, False
        monkeypatch.setattr(rack_drain, "_entered", lambda: (self, self, self._look))
        monkeypatch.setattr(drains, "tell", self._tell)
        monkeypatch.setattr(drains, "withdraw", lambda mac: self.done.append(f"withdrawn {mac}"))
        monkeypatch.setattr(rack_drain, "LOOK_S", 0.0)
        monkeypatch.setattr(rack_drain.time, "time", lambda: 1000.0)

    def _tell(self, drain: Drain) -> None:
        self.done.append(drain)
        self.status = replace(self.status, drains=(drain,))

    def _look(self) -> RackStatus:
        if self.status.drains:
            self.stays -= 1
        if self.stays <= 0:
            self.status = replace(self.status, replicas=tuple(one for one in self.status.replicas if one != ENGINE))
        if self.stays <= 0 and "ray" in self.done:
            gone = replace(MACS[0], alive=False, drained=True)
            self.status = replace(self.status, members=(gone, MACS[1]))
        return self.status

    def drain_node(self, node: str, reason: int, said: str, deadline: int, timeout: float) -> tuple[bool, str]:
        assert (node, said, deadline) == ("n1", "pomarium rack drain", 0)
        self.done.append(
            "ray" if ENGINE not in self.status.replicas or not self.status.drains[0].until else "ray, too early"
        )
        return self.accepts, "" if self.accepts else "it is busy"


@pytest.fixture
def rack(monkeypatch: pytest.MonkeyPatch) -> Rack:
    return Rack(monkeypatch)


def run(*arguments: str) -> int:
    return main.main(["rack", *arguments])


def test_engines_are_told_and_then_ray(rack: Rack, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("drain", "mac-1") == 0
    assert rack.done == [Drain("mac-1", "n1"), "ray"]
    assert capsys.readouterr().out.splitlines() == [
        "mac-1 takes nothing new; 1 engine(s) leave it: r1",
        "mac-1 is free: its node has ended. `pomarium rack undrain mac-1` lets it join again.",
    ]


def test_the_last_engine_of_a_model_is_told_when_another_serves(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    later = [("r1",), ("r1",), ()]
    monkeypatch.setattr(drain_check, "spared", lambda mac, status: later.pop(0))
    assert run("drain", "mac-1") == 0
    assert rack.done == [Drain("mac-1", "n1", 0.0, ("r1",)), "ray", Drain("mac-1", "n1")]
    assert later == []


def test_with_time_ray_is_told_once_the_engines_have_left(rack: Rack) -> None:
    other = replace(ENGINE, replica="r2", stages=(replace(STAGE, mac="mac-2"),))
    rack.status = replace(rack.status, replicas=(ENGINE, other))
    assert run("drain", "mac-1", "--wait", "15m") == 0
    assert rack.done == [Drain("mac-1", "n1", 1900.0), "ray"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["drain", "nope"], "There is no Mac 'nope' in the rack: it has mac-1, mac-2."),
        (["undrain", "nope"], "There is no Mac 'nope' in the rack"),
        (["undrain", "mac-1"], "mac-1 is alive and not drained"),
        (["drain", "mac-1", "--wait", "long"], "--wait: "),
    ],
)
def test_what_is_refused_tells_nobody(
    rack: Rack, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert run(*arguments) == 1
    told = capsys.readouterr()
    assert said in told.err
    assert (told.out, rack.done) == ("", [])


def test_what_does_not_end_is_named(
    rack: Rack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rack.stays = 1 << 60
    monkeypatch.setattr(rack_drain, "LEAVE_S", 0.01)
    assert run("drain", "mac-1") == 1
    assert "mac-1 is not free after 0.01 s: r1 is still there" in capsys.readouterr().err


def test_ray_s_refusal_is_told(rack: Rack, capsys: pytest.CaptureFixture[str]) -> None:
    rack.accepts = False
    assert run("drain", "mac-1") == 1
    assert "Ray does not drain mac-1: it is busy" in capsys.readouterr().err


@pytest.mark.parametrize("simulated", [False, True])
def test_it_is_taken_back(
    rack: Rack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, simulated: bool
) -> None:
    """A simulated Mac is this machine, which starts it."""
    rack.simulated = simulated
    stub = SimpleNamespace(macs=(), rejoin=lambda mac: rack.done.append(f"joined {mac}"))
    monkeypatch.setattr(simulate, "SimulatedRack", lambda found, environ: stub)
    assert run("drain", "mac-1") == 0
    assert run("undrain", "mac-1") == 0
    assert rack.done[2:] == ["withdrawn mac-1", *(["joined mac-1"] if simulated else [])]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == ("mac-1 has joined again" if simulated else
                    "mac-1 joins again if its agent runs; else run `pomarium rack join` there.")  # fmt: skip


def test_engines_that_still_answer_stay(rack: Rack, capsys: pytest.CaptureFixture[str]) -> None:
    rack.status = replace(rack.status, drains=(Drain("mac-1", "n1", 1900.0),))
    assert run("undrain", "mac-1") == 0
    assert rack.done == ["withdrawn mac-1"]
    assert "mac-1 stays in the rack" in capsys.readouterr().out


def test_without_a_rack(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for command in ("drain", "undrain"):
        assert run(command, "mac-1") == 1
        assert "No rack" in capsys.readouterr().err
