"""From a ServePlan to a running endpoint and back to nothing, phase by phase.

serving(plan): Ray (own or joined) and Serve, meanwhile models found and checked -> engines ready ... -> all of it gone
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from pomarium.cluster import faults
from pomarium.cluster.endpoint import local_ray, residence
from pomarium.cluster.endpoint.local_ray import HeadLostError
from pomarium.cluster.node.ray_names import ENGINE_PREFIX
from pomarium.cluster.replica.model_check import Check, Found
from pomarium.cluster.replica.serve_plan import APP_NAME, ENDPOINT, ServePlan
from pomarium.worker.errors import CheckpointError, PomariumError, SettingsError

if TYPE_CHECKING:
    from ray.serve.schema import ApplicationStatusOverview

Phase = Callable[[str], AbstractContextManager[None]]
"""Told of each phase; enters it, and leaves it when it is done."""


SERVE_NAMESPACE = "serve"
"""Ray's namespace of Serve's actors."""

SERVE_SAYS_FAILED = "A replica failed to start"
"""How Serve's message about a deployment begins once a start has failed."""

START_LOOK_S = 0.2
"""How often it is looked whether the engines are up."""


class EngineStartError(PomariumError):
    """An engine did not start; says why."""


@contextmanager
def serving(
    plan: ServePlan,
    phase: Phase,
    environ: Mapping[str, str] = os.environ,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[tuple[ServePlan, Sequence[Found]]]:
    """The endpoint answers while the context is open, with the models found; the plan is of these. Leaving it ends all
    that was started.

    Args:
        say: told of each model that is left out.

    Raises:
        CheckpointError: a model is missing, damaged or of an unknown kind.
        EngineStartError: with the first engine's reason.
        SettingsError: if RAY_ADDRESS names a Ray that does not answer or is too small.
    """
    joined = bool(environ.get("RAY_ADDRESS"))
    each = plan.on_demand is not None or any(model.optional for model in plan.models)
    check = Check([model.source for model in plan.models], each)
    with ExitStack() as stack:
        stack.callback(check.abandon)
        stack.enter_context(ray_running(plan, phase, environ))
        if not joined:  # an own Ray takes Serve with it, should a model turn out to be faulty
            with phase("serve"):
                _start_serve()
        with phase("model"):
            plan, found = _found(plan, check, say) if each else (plan, check.found())
        try:
            with phase("engine"):
                _deploy(plan, found, environ if joined else {})
        except BaseException:
            if joined:  # an own Ray takes them with it
                _remove(joined)
            raise
        try:
            yield plan, found
        except HeadLostError:  # nobody is left who could take it away in order
            raise
        except BaseException:
            _remove(joined)
            raise
        else:
            _remove(joined)


def _found(plan: ServePlan, check: Check, say: Callable[[str], None]) -> tuple[ServePlan, Sequence[Found]]:
    """What can be served of the plan, and what was found of it; models that are too large are refused when they are
    asked for, unless all are. Raises CheckpointError, SettingsError."""
    from pomarium.cluster.replica import model_need

    looked = check.looked()
    for model, one in zip(plan.models, looked.found, strict=True):
        if isinstance(one, str) and not model.optional:
            raise CheckpointError(one)
    assert looked.room is not None
    plan, found, left_out = model_need.settled(plan, looked.found, looked.room)
    for line in left_out:
        say(line)
    if plan.on_demand is not None and plan.on_demand.memory is not None:
        unfit = residence.unfit(plan.on_demand.sizes, plan.on_demand.pins, plan.on_demand.memory)
        if len(unfit) == len(plan.models):
            raise SettingsError(f"No model can be loaded. {' '.join(unfit.values())}")
        for line in unfit.values():
            say(line)
    return plan, found


@contextmanager
def ray_running(plan: ServePlan, phase: Phase, environ: Mapping[str, str]) -> Iterator[None]:
    """This process is connected to Ray while the context is open: to RAY_ADDRESS's, or to one of its own.

    Raises:
        SettingsError: RAY_ADDRESS names a Ray that does not answer or is too small for `plan`.
    """
    if address := environ.get("RAY_ADDRESS"):
        with phase("ray"):
            local_ray.join(address, plan)
        yield
        return
    with phase("ray"):
        local = local_ray.start(plan)
    try:
        yield
    finally:
        local_ray.stop(local)


def _start_serve() -> None:
    """Changes nothing where Serve runs."""
    from ray import serve

    serve.start(proxy_location="Disabled")  # the ingress listens by itself


def _deploy(plan: ServePlan, found: Sequence[Found], environ: Mapping[str, str]) -> None:
    from ray import serve

    from pomarium.cluster.endpoint import app
    from pomarium.cluster.rack import power_states
    from pomarium.cluster.replica import patience

    _start_serve()
    patience.starts(ENDPOINT)
    built = app.build(plan, found, app.passed_environment(environ), macs_sleep=bool(power_states.read_all()))
    comes_and_goes = plan.on_demand is not None
    target = serve.RunTarget(target=built, name=APP_NAME, route_prefix=None, external_scaler_enabled=comes_and_goes)
    serve.run_many([target], wait_for_applications_running=False)
    while not _is_up(serve.status().applications[APP_NAME]):
        time.sleep(START_LOOK_S)
    patience.came_up(ENDPOINT)


def _is_up(known: "ApplicationStatusOverview") -> bool:
    """Whether all its deployments run. Raises EngineStartError at the first start that failed: Serve tries again."""
    messages = [deployment.message for deployment in known.deployments.values()]
    failed = any(message.startswith(SERVE_SAYS_FAILED) for message in messages)
    if failed or known.status == "DEPLOY_FAILED":
        said = "\n".join(filter(None, [*messages, known.message]))
        sentence = faults.marked_sentence(said)
        raise EngineStartError(sentence or f"The engine did not start: {faults.one_line(said)}")
    return bool(known.status == "RUNNING")


def _remove(joined: bool) -> None:
    from ray import serve

    if joined:
        serve.delete(APP_NAME, _blocking=False)
        _end_engines(APP_NAME)
        serve.delete(APP_NAME)
        if serve.status().applications:  # others run there
            return
    serve.shutdown()


def _end_engines(application: str) -> None:
    """End the engines' processes: Serve would give those that come and go minutes for what they have taken (app.py)."""
    import ray
    from ray.util import list_named_actors

    engines = f"SERVE_REPLICA::{application}#{ENGINE_PREFIX}"
    for actor in list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and actor["name"].startswith(engines):
            with suppress(ValueError):  # it ended meanwhile
                ray.kill(ray.get_actor(actor["name"], namespace=SERVE_NAMESPACE))
