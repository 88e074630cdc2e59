"""When a replica that does not fit fails, and when it waits."""

from collections.abc import Callable

import pytest

from pomarium.cluster.executor.bundles import PlacementError
from pomarium.cluster.rack.reports import LossReport, WaitingReport
from pomarium.cluster.replica import patience


class Rack:
    """Has room at the attempt after those that are refused with `reasons`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, up: bool, *reasons: str) -> None:
        self._reasons = list(reasons)
        self.told: list[str] = []
        self.withdrawn: list[str] = []
        monkeypatch.setattr(patience, "is_up", lambda group: up and group == "g")
        monkeypatch.setattr(patience, "PAUSE_S", 0.0)
        monkeypatch.setattr(patience.reports, "publish_waiting", self._publish)
        monkeypatch.setattr(patience.reports, "withdraw_waiting", self.withdrawn.append)

    def _publish(self, report: WaitingReport) -> None:
        assert (report.model, report.replica) == ("m", "r1")
        assert report.waking == report.reason.endswith("being woken.")
        self.told.append(report.reason)

    def place(self, say: Callable[[str], None]) -> str:
        if self._reasons and self._reasons[0].endswith("being woken"):
            say(self._reasons.pop(0))
        if self._reasons:
            raise PlacementError(self._reasons.pop(0))
        return "team"


def test_one_that_fits_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack(monkeypatch, True)
    assert patience.wait_for(rack.place, "m", "r1", "g") == "team"
    assert rack.told == rack.withdrawn == []


def test_while_the_endpoint_starts_a_refusal_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack(monkeypatch, False, "2 stages need 2 Macs")
    with pytest.raises(PlacementError, match="2 stages need 2 Macs"):
        patience.wait_for(rack.place, "m", "r1", "g")
    assert rack.told == []


def test_later_it_waits_and_tells_the_reason_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack(monkeypatch, True, "two are missing", "two are missing", "one is missing")
    assert patience.wait_for(rack.place, "m", "r1", "g") == "team"
    assert rack.told == ["two are missing", "two are missing", "one is missing"]
    assert rack.withdrawn == ["r1"]


def test_it_tells_of_macs_that_are_woken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rack = Rack(monkeypatch, False, "mac-1 is being woken")
    assert patience.wait_for(rack.place, "m", "r1", "g") == "team"
    assert (rack.told, rack.withdrawn) == (["mac-1 is being woken."], ["r1"])


def test_other_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    Rack(monkeypatch, True)

    def broken(say: Callable[[str], None]) -> str:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        patience.wait_for(broken, "m", "r1", "g")


def test_a_failed_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[LossReport] = []
    monkeypatch.setattr(patience.reports, "publish_loss", losses.append)
    patience.start_failed("m", "r2", "The disk is full.")
    (told,) = losses
    assert (told.model, told.replica, told.reason) == ("m", "r2", "its start failed: The disk is full")
