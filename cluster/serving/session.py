"""From a ServePlan to a running endpoint and back to nothing, phase by phase.

serving(plan): Ray (own or joined) and Serve, meanwhile models found and checked -> engines ready ... -> all of it gone
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass

from pomarium.cluster import faults
from pomarium.cluster.model_names import ENGINE_PREFIX
from pomarium.cluster.serving import local_ray
from pomarium.cluster.serving.check import Check, Found
from pomarium.cluster.serving.plan import ENDPOINT, ServePlan
from pomarium.worker.errors import PomariumError

Phase = Callable[[str], AbstractContextManager[None]]
"""Told of each phase; enters it, and leaves it when it is done."""


SERVE_NAMESPACE = "serve"
"""Ray's namespace of Serve's actors."""


class EngineStartError(PomariumError):
    """An engine did not start; says why."""


@dataclass(frozen=True)
class Status:
    """Serve's view of the endpoint: running or not, and what it says about it."""

    running: bool
    message: str


@contextmanager
def serving(plan: ServePlan, phase: Phase, environ: Mapping[str, str] = os.environ) -> Iterator[None]:
    """The endpoint answers while the context is open. Leaving it ends all that was started.

    Raises:
        CheckpointError: a model is missing, damaged or of an unknown kind.
        EngineStartError: with the first engine's reason.
        SettingsError: if RAY_ADDRESS names a Ray that does not answer or is too small.
    """
    joined = bool(environ.get("RAY_ADDRESS"))
    check = Check([model.source for model in plan.models])
    with ExitStack() as stack:
        stack.callback(check.abandon)
        stack.enter_context(ray_running(plan, phase, environ))
        if not joined:  # an own Ray takes Serve with it, should a model turn out to be faulty
            with phase("serve"):
                _start_serve(plan)
        with phase("model"):
            found = check.found()
        with phase("engine"):
            _deploy(plan, found, environ if joined else {})
        try:
            yield
        finally:
            _remove(joined)


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


def _start_serve(plan: ServePlan) -> None:
    """Changes nothing where Serve runs."""
    from ray import serve

    serve.start(proxy_location="HeadOnly", http_options={"host": plan.host, "port": plan.port})


def _deploy(plan: ServePlan, found: Sequence[Found], environ: Mapping[str, str]) -> None:
    from ray import serve

    from pomarium.cluster.rack import power
    from pomarium.cluster.serving import app, patience

    _start_serve(plan)
    patience.starts(ENDPOINT)
    try:
        serve.run(
            app.build(plan, found, app.passed_environment(environ), macs_sleep=bool(power.read_all())),
            name=app.APP_NAME,
            route_prefix="/",
            blocking=False,
        )
    except RuntimeError as e:
        messages = [d.message for d in serve.status().applications[app.APP_NAME].deployments.values()]
        sentence = faults.marked_sentence("\n".join([*messages, str(e)]))
        raise EngineStartError(sentence or f"The engine did not start: {faults.one_line(str(e))}") from e
    patience.came_up(ENDPOINT)


def _remove(joined: bool) -> None:
    from ray import serve

    from pomarium.cluster.serving import app

    if joined:
        serve.delete(app.APP_NAME, _blocking=False)
        _end_engines(app.APP_NAME)
        serve.delete(app.APP_NAME)
        if serve.status().applications:  # others use the proxy
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


def status() -> Status:
    """How the endpoint is doing, as Serve's controller knows it."""
    from ray import serve

    from pomarium.cluster.serving import app

    known = serve.status().applications[app.APP_NAME]
    messages = [d.message for d in known.deployments.values() if d.message]
    return Status(known.status.value == "RUNNING", "; ".join(faults.one_line(m) for m in messages))
