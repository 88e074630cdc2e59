"""Serve's own state of a deployment begins no start for a while after one that failed."""

import pytest
from ray.serve._private.common import DeploymentID
from ray.serve._private.deployment_state import DeploymentState
from ray.serve._private.utils import call_function_from_import_path

from pomarium.cluster.endpoint import pacing
from pomarium.cluster.node.ray_node import SERVE_VARIABLES


class State(DeploymentState):
    """A deployment of one replica that is missing; the rest of Serve's controller is away."""

    def __init__(self) -> None:
        self._id = DeploymentID("engine:m", "pomarium")
        self._replica_failure_count = 0


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be changed; Serve's class is put back afterwards."""

    def record(self: State, error_msg: str) -> None:
        self._replica_failure_count += 1

    monkeypatch.setattr(DeploymentState, "_record_replica_failure", record)
    monkeypatch.setattr(DeploymentState, "_get_target_replica_delta", lambda self: self.delta)
    clock = [100.0]
    pacing.install(lambda: clock[0])
    return clock


def test_pauses_grow_to_a_minute() -> None:
    pauses = [pacing.pause_s(failures) for failures in (0, 1, 2, 3, 4, 5, 6, 7, 5000)]
    assert pauses == [0, 2, 4, 8, 16, 32, 60, 60, 60]


def test_no_start_begins_in_a_pause(now: list[float]) -> None:
    state = State()
    state.delta = 1
    assert state._get_target_replica_delta() == 1
    for pause in (2, 4, 8):
        state._record_replica_failure("failed")
        now[0] += pause - 0.5
        assert state._get_target_replica_delta() == 0
        now[0] += 1
        assert state._get_target_replica_delta() == 1
    state._record_replica_failure("failed")
    state._replica_failure_count = 0
    assert state._get_target_replica_delta() == 1, "all run, or it was deployed anew"


def test_what_is_too_many_ends_also_in_a_pause(now: list[float]) -> None:
    state = State()
    state.delta = -1
    state._record_replica_failure("failed")
    assert state._get_target_replica_delta() == -1


def test_one_deployment_does_not_wait_for_another(now: list[float]) -> None:
    failing, other = State(), State()
    failing.delta = other.delta = 1
    failing._record_replica_failure("failed")
    assert (failing._get_target_replica_delta(), other._get_target_replica_delta()) == (0, 1)


def test_serves_controller_finds_it_and_it_finds_what_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_record_replica_failure", "_get_target_replica_delta"):
        monkeypatch.setattr(DeploymentState, name, getattr(DeploymentState, name))
    call_function_from_import_path(SERVE_VARIABLES["RAY_SERVE_CONTROLLER_CALLBACK_IMPORT_PATH"])
    assert DeploymentState._get_target_replica_delta.__module__ == pacing.__name__
