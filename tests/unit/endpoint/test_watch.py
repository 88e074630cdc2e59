"""What the terminal tells of a running endpoint, and when it gives a Ray without its head up."""

import errno
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest

from pomarium.cluster import faults
from pomarium.cluster.endpoint import watch
from pomarium.cluster.endpoint.local_ray import HeadLostError
from pomarium.cluster.endpoint.watch import Status, Watch
from pomarium.cluster.rack import serve_actors
from pomarium.cluster.rack.reports import LossReport
from pomarium.cluster.rack.serve_actors import CONTROLLER, ENGINE, INGRESS, ServeActor

ENGINE_ONE = ServeActor(ENGINE, "engine:tiny", "r1", alive=True, began=1.0)
KILLED = replace(ENGINE_ONE, alive=False, end="its process crashed or was killed", ended=50.0)
OTHERS = (
    ServeActor(CONTROLLER, alive=True),
    ServeActor(INGRESS, "ingress", "i1", alive=True),
)
REPORT = LossReport("tiny", "r1", "its worker was killed", 50.0)


class Endpoint:
    """A watched endpoint on a clock of its own."""

    def __init__(self, *statuses: Status | Exception, head: Callable[[float], bool] = lambda now: True) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.asked: list[float] = []
        self._statuses = list(statuses)
        self.watch = Watch(self.lines.append, self._look, lambda: head(self.now), lambda: self.now)

    def _look(self, since: float) -> Status:
        self.asked.append(since)
        status = self._statuses.pop(0) if len(self._statuses) > 1 else self._statuses[0]
        if isinstance(status, Exception):
            raise status
        return status

    def steps(self, count: int) -> list[str]:
        for _ in range(count):
            self.now += 1
            self.watch.step()
        return [line.split(" ", 1)[1] for line in self.lines]


def test_changes_are_told_once() -> None:
    lost, failing = Status(False, "an engine was lost (tiny: x)"), Status(False, "an engine does not start: y")
    endpoint = Endpoint(Status(True), lost, lost, failing, Status(True), Status(True))
    assert endpoint.steps(6) == ["an engine was lost (tiny: x)", "an engine does not start: y", "ready again"]
    assert endpoint.asked == [1000, 1000, 1000, 1000, 1000, 1005], "losses count since it became ready"


def test_a_loss_counts_that_serve_tells_of_late() -> None:
    endpoint = Endpoint(*[Status(True)] * 100, Status(False, "lost"))
    endpoint.steps(103)
    assert endpoint.asked[100] == endpoint.asked[102] == 1101 - watch.RECENT_S


def test_a_controller_that_is_back_before_a_look_is_told_of() -> None:
    lost = [watch.CONTROLLER_LOST, "ready again"]
    endpoint = Endpoint(*[Status(True, restarts=count) for count in (1, 1, 2, 2)])
    assert endpoint.steps(4) == lost, "those before this endpoint are not its own"
    seen = Endpoint(Status(True, restarts=0), Status(False, watch.CONTROLLER_LOST), Status(True, restarts=1))
    assert seen.steps(4) == lost, "told once"


def test_a_controller_that_is_back_within_a_look_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first look, which has nothing to compare with: it waits while Ray starts the controller again."""
    from ray import serve

    seen = [replace(OTHERS[0], restarts=count) for count in (3, 4, 4, 4)]
    running = SimpleNamespace(applications={watch.APP_NAME: SimpleNamespace(status="RUNNING", deployments={})})
    monkeypatch.setattr(serve_actors, "read", lambda: (seen.pop(0),))
    monkeypatch.setattr(watch, "shortage", lambda: None)
    monkeypatch.setattr(serve, "status", lambda: running)
    assert watch.look(0.0) == Status(False, watch.CONTROLLER_LOST)
    assert watch.look(0.0) == Status(True, restarts=4)


def test_a_look_that_fails_ends_nothing() -> None:
    assert Endpoint(Status(True), RuntimeError("busy"), Status(True)).steps(4) == []


def test_a_terminal_on_a_full_disk_ends_nothing() -> None:
    endpoint = Endpoint(Status(True), Status(False, "an engine was lost"), Status(True))

    def full(text: str) -> None:
        endpoint.lines.append(text)
        raise OSError(errno.ENOSPC, "No space left on device")

    endpoint.watch._say = full
    assert endpoint.steps(4) == ["an engine was lost", "ready again"]


def test_a_short_silence_of_the_head_is_none() -> None:
    assert Endpoint(Status(True), head=lambda now: now not in (1002, 1003)).steps(6) == []


def test_without_a_head_it_is_told_and_then_ended() -> None:
    endpoint = Endpoint(Status(True), head=lambda now: now < 1003)
    said = endpoint.steps(3 + int(watch.HEAD_GONE_S))
    assert said == [f"{watch.HEAD_GONE}: engines go on for {watch.HEAD_GRACE_S:g} s, and then all of it ends"]
    with pytest.raises(HeadLostError, match=r"GCS.* has ended, and so the endpoint was stopped"):
        endpoint.steps(int(watch.HEAD_GRACE_S) + 2)
    assert len(endpoint.lines) == 1


def test_a_head_that_answers_again_in_time_is_none_that_ended() -> None:
    endpoint = Endpoint(Status(True), head=lambda now: not 1002 < now < 1020)
    assert [line.partition(":")[0] for line in endpoint.steps(30)] == [watch.HEAD_GONE, "Ray's head answers again"]


def test_a_look_without_an_end_does_not_hide_the_loss_of_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "LOOK_S", 0.01)
    never = threading.Event()
    endpoint = Endpoint(Status(True), head=lambda now: now < 1002)
    endpoint.watch._look = lambda since: Status(never.wait(60))
    assert len(endpoint.steps(3 + int(watch.HEAD_GONE_S))) == 1
    never.set()


def test_an_engine_that_could_tell_knows_more_than_ray() -> None:
    assert watch.loss_of("engine:tiny", (KILLED,), (REPORT,), 0) == "its worker was killed"
    assert watch.loss_of("engine:tiny", (ENGINE_ONE,), (REPORT,), 0) == "its worker was killed", "not yet gone"
    assert watch.loss_of("engine:tiny", (KILLED,), (), 0) == "its process crashed or was killed"
    other = replace(KILLED, replica="r2", ended=60.0)
    assert watch.loss_of("engine:tiny", (KILLED, other), (REPORT,), 0) == "its process crashed or was killed"
    assert watch.loss_of("engine:tiny", (KILLED,), (REPORT,), 51) is None, "long ago"
    assert watch.loss_of("engine:other", (KILLED,), (REPORT,), 0) is None


@pytest.mark.parametrize(
    ("messages", "actors", "expected"),
    [
        ({"engine:tiny": ""}, (KILLED, *OTHERS),
         "an engine was lost (tiny: its process crashed or was killed); Serve starts another"),
        ({"engine:tiny": f"A replica failed to start.\n{faults.StartError('The disk is full.')}"}, (KILLED, *OTHERS),
         "an engine does not start: The disk is full; Serve tries again"),
        ({"engine:tiny": ""}, (ENGINE_ONE, *OTHERS[:1], replace(OTHERS[1], alive=False, end="it was killed")),
         "the ingress was lost: it was killed"),
        ({"engine:tiny": ""}, (ENGINE_ONE, *OTHERS, replace(OTHERS[1], replica="i2", alive=False, end="it was killed")),
         "one of the ingresses was lost (it was killed); the others go on, and Serve starts another"),
        ({"engine:tiny": ""}, (ENGINE_ONE, *OTHERS), "Serve looks whether all engines are there"),
    ],
)  # fmt: skip
def test_what_is_told(messages: dict[str, str], actors: tuple[ServeActor, ...], expected: str) -> None:
    assert watch.told(messages, actors, (), 0.0) == expected
