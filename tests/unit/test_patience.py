"""When a replica that does not fit fails, and when it waits."""

from collections.abc import Callable

import pytest

from pomarium.cluster.executor.bundles import PlacementError
from pomarium.cluster.rack.reports import LossReport, WaitingReport
from pomarium.cluster.serving import patience


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


class Store:
    """Ray's key-value store of one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[bytes, bytes] = {}
        self.losses: list[LossReport] = []
        monkeypatch.setattr(patience.internal_kv, "_internal_kv_get", lambda key, namespace: self.values.get(key))
        monkeypatch.setattr(patience.internal_kv, "_internal_kv_put", self._put)
        monkeypatch.setattr(patience.internal_kv, "_internal_kv_del", lambda key, namespace: self.values.pop(key, None))
        monkeypatch.setattr(patience.reports, "publish_loss", self.losses.append)

    def _put(self, key: bytes, value: bytes, namespace: bytes) -> None:
        self.values[key] = value


def test_pauses_between_failed_starts_grow_to_a_minute() -> None:
    assert [patience.pause_s(failures) for failures in (1, 2, 3, 4, 5, 6, 7, 5000)] == [2, 4, 8, 16, 32, 60, 60, 60]


def test_failed_starts_are_told_and_counted_until_one_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(monkeypatch)
    assert [patience.start_failed("m", f"r{i}", "The disk is full.") for i in range(3)] == [2, 4, 8]
    assert patience.start_failed("other", "r9", "x") == 2
    last = store.losses[2]
    assert (last.model, last.replica) == ("m", "r2")
    assert last.reason == "its start failed, 3 in a row: The disk is full; the next in 8 s"
    patience.started("m")
    assert patience.start_failed("m", "r4", "x") == 2
