"""Models that may have no engine: how many Serve starts, how long requests are held, which Macs plans count on."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import Request

from pomarium.cluster import faults
from pomarium.cluster.endpoint import app, holding, reasons, replica_scaling
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.holding import HopelessError, State, verdict
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.replica_scaling import ReplicaScaling
from pomarium.cluster.executor.survey import dormant
from pomarium.cluster.placement.profile import Profiles
from pomarium.cluster.rack.labels import MacFacts, labels_of
from pomarium.cluster.rack.mac_power import MacPower, Power
from pomarium.cluster.replica.heartbeat import SILENCE_S
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.serve_plan import ModelPlan, Scaling, ServePlan

MISSING = str(faults.StartError("no Mac can be woken"))


# --- Serve's policy -------------------------------------------------------------------------------------------------


@dataclass
class Context:
    """What Serve hands in."""

    total_num_requests: float
    target_num_replicas: int
    policy_state: dict[str, Any]


def test_serve_is_asked_for_engines_by_load_and_lets_them_go_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(replica_scaling.time, "time", lambda: clock[0])
    scaling, state, count = ReplicaScaling(0, 3, 8.0, 60.0, 0.0), dict[str, Any](), 0
    seen = []
    for passed, ongoing in ((0, 0), (1, 1), (1, 20), (1, 100), (1, 0), (58, 0), (2, 0), (60, 0)):
        clock[0] += passed
        count, state = scaling(Context(ongoing, count, json.loads(json.dumps(state))))  # type: ignore[arg-type]
        seen.append(count)
    assert seen == [0, 1, 3, 3, 3, 3, 0, 0]


def test_a_restarted_controller_keeps_what_it_finds_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_scaling.time, "time", lambda: 1000.0)
    assert ReplicaScaling(0, 3, 8.0, 60.0, 0.0)(Context(0, 2, {}))[0] == 2  # type: ignore[arg-type]


def test_serve_accepts_the_settings_and_its_own_delays_are_off() -> None:
    config = replica_scaling.config(Scaling(0, 3, 4.0, 60.0))
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 0, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s) == (0, 0, 0)
    made = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert made(Context(9, 1, {}))[0] == 3


def deployments(plan: ModelPlan, macs_sleep: bool) -> Any:
    found = Found(Path("/models/m"), Profiles.__new__(Profiles))  # only handed on
    return app.build(ServePlan((plan,)), [found], {}, macs_sleep)._bound_deployment.init_args[3][plan.name]


def test_a_model_that_may_sleep_holds_requests_and_its_engines_own_processes_are_on_the_head() -> None:
    bound = deployments(ModelPlan("m", scaling=Scaling(0, 2)), True)._bound_deployment
    assert bound._deployment_config.request_router_config.request_router_kwargs == {"holds": True}
    assert bound._deployment_config.autoscaling_config.max_replicas == 2
    assert bound.ray_actor_options["resources"] == {app.HEAD: 0.001}
    plain = deployments(ModelPlan("m", replicas=2), False)._bound_deployment
    assert plain._deployment_config.request_router_config.request_router_kwargs == {"holds": False}
    assert plain._deployment_config.autoscaling_config is None
    assert (plain._deployment_config.num_replicas, plain.ray_actor_options["num_cpus"]) == (2, 1.0)


# --- holding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "held_s", "served_s", "reason"),
    [
        (State(), 100.0, 0.0, None),
        (State(), holding.LONGEST_S + 1, 0.0, "no Mac woke"),
        (State("mac-1 is being woken", 0, True, True), 500.0, 0.0, None),
        (State(MISSING, 0, True), holding.GRACE_S - 1, 0.0, None),
        (State(MISSING, 0, True), holding.GRACE_S, 0.0, "no Mac can be woken"),
        (State(MISSING), 0.0, 0.0, "no Mac can be woken"),
        (State(MISSING, 1), 100.0, 1.0, None),
        (State("", 1), 100.0, SILENCE_S + 1, holding.SILENT),
        (State("Deploying"), 100.0, 0.0, None),
    ],
)
def test_how_long_a_request_is_held(state: State, held_s: float, served_s: float, reason: str | None) -> None:
    found = verdict(state, held_s, served_s)
    assert found is None if reason is None else reason in (found or "")


def hold(states: Sequence[State], answer_after: int | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Held with these states, one a look; the answer comes after so many."""
    monkeypatch.setattr(holding, "LOOK_S", 0.01)
    looks = 0

    async def run() -> Any:
        nonlocal looks
        came = asyncio.Event()

        async def first() -> str:
            await came.wait()
            return "accepted"

        async def state() -> State:
            nonlocal looks
            looks += 1
            if looks == answer_after:
                came.set()
            return states[min(looks, len(states)) - 1]

        return await holding.held(first(), state)

    return asyncio.run(run())


def test_a_held_request_is_answered_or_told_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hold([State()], 3, monkeypatch) == "accepted"
    with pytest.raises(HopelessError, match="no Mac can be woken"):
        hold([State(), State(MISSING)], None, monkeypatch)


class Untouchable:
    """A handle that must not be called: a call would keep the engine awake."""

    deployment_name = "engine:m"


@pytest.mark.parametrize(
    ("state", "status", "word"),
    [
        (State(), 200, "asleep"),
        (State("", 1), 200, "ok"),
        (State("mac-1 is being woken.", 0, True, True), 200, "waking"),
        (State(MISSING, 0, True), 503, "no Mac can be woken"),
    ],
)
def test_health_of_a_model_that_may_sleep_asks_no_engine(
    state: State, status: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reasons, "READ_S", 30.0)  # a busy machine starts a thread late

    async def ask() -> Any:
        handles: Any = {"m": Untouchable()}
        served = {"m": Served("m", sleeps=True)}
        ingress = Ingress(handles, served=served, head_answers=lambda: True, shortage=lambda: None)
        ingress._reasons = Reasons(lambda: {"engine:m": state})
        return await ingress.health(Request({"type": "http"}))

    answer = asyncio.run(ask())
    assert (answer.status_code, json.loads(bytes(answer.body))["models"]) == (status, {"m": word})


# --- which Macs a plan may count on ---------------------------------------------------------------------------------


def power(name: str, state: Power, **more: Any) -> MacPower:
    labels = labels_of(MacFacts(name, "M4 Max", 64 << 30, 40 << 30, 4e11, 1e13, "1"))
    return MacPower(name, f"10.0.0.{name[-1]}", state, 1.0, labels=labels, **more)


def test_plans_count_on_those_that_would_come_the_reliable_ones_first() -> None:
    found = dormant(
        [
            power("m1", Power.ASLEEP, failures=1, wakes=1),
            power("m2", Power.ASLEEP, wakes=5),
            power("m3", Power.ASLEEP, not_before=99.0, reason="it did not join"),
            power("m4", Power.AWAKE),
            power("m5", Power.WAKING, wakes=1),
            power("m6", Power.ASLEEP),
        ],
        {"m6"},
        50.0,
    )
    assert [node.mac.name for node in found.nodes] == ["m5", "m2", "m1"]
    assert all(node.asleep and node.id == "" and node.apple and node.free == 1 for node in found.nodes)
    assert found.nodes[0].mac.memory == 40 << 30
    assert found.reasons == ("m3 (it did not join)",)


@given(st.lists(st.tuples(st.sampled_from(list(Power)), st.floats(0, 100)), max_size=8), st.sets(st.integers(0, 7)))
def test_no_mac_is_offered_that_is_there_or_would_not_come(macs: list[tuple[Power, float]], awake: set[int]) -> None:
    told = [power(f"m{i}", state, not_before=at) for i, (state, at) in enumerate(macs)]
    found = dormant(told, {f"m{i}" for i in awake}, 50.0)
    offered = {node.mac.name for node in found.nodes}
    assert not offered & {f"m{i}" for i in awake}
    assert all(mac.wakeable(50.0) for mac in told if mac.name in offered)
    assert len(offered) == len(found.nodes)
