"""The Ray Serve application: one deployment per model behind the ingress."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.deployment import Application

from pomarium.cluster.endpoint import replica_scaling
from pomarium.cluster.endpoint.cards import Served, root_of
from pomarium.cluster.endpoint.ingress_replica import FAREWELL_S, IngressReplica
from pomarium.cluster.endpoint.on_demand import OnDemandModels
from pomarium.cluster.endpoint.residence import Rules
from pomarium.cluster.machine.state import state_folder
from pomarium.cluster.node.ray_names import deployment_name
from pomarium.cluster.node.ray_node import MOST_STARTS
from pomarium.cluster.node.worker_environment import ENDPOINT_OWN, NODE_OWN, parted
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.replica import EngineReplica
from pomarium.cluster.replica.serve_plan import INGRESS_CPUS, REPLICA_CPUS, Batches, ModelPlan, ServePlan
from pomarium.worker.command_buffers import is_default

MAX_REQUESTS = 10_000
"""Requests that Serve hands to one replica at once: vLLM's scheduler queues them, Serve must not."""

DRAIN_S = 900
"""What an engine that is not needed any more leaves to requests that it has taken: it gets no new ones meanwhile."""

HEAD = "node:__internal_head__"
"""Ray's resource of its head: files and batches are on that machine's disk."""

ROUTER = "pomarium.cluster.endpoint.prefix_router.PrefixRouter"
"""How Serve chooses among a model's engines."""

PASSED_PREFIXES = ("VLLM_", "POMARIUM_", "HF_", "MLX_", "MODELSCOPE_", "TRANSFORMERS_")
"""Environment variables that reach replicas on every machine of a rack."""


def passed_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the command line's environment the replicas get."""
    kept_here = NODE_OWN | ENDPOINT_OWN
    return {
        name: value
        for name, value in environ.items()
        if name.startswith(PASSED_PREFIXES) and name not in kept_here and not is_default(name, value)
    }


def build(
    plan: ServePlan, found: Sequence[Found], environment: Mapping[str, str], macs_sleep: bool = False
) -> Application:
    """`plan` as an application for `serve.run`.

    Args:
        found: the checkpoint of each model.
        environment: what replicas get beyond what their Ray has.
        macs_sleep: the rack puts idle Macs to sleep. Then all replicas' own processes are on the head, which does not:
            Serve would spread them, and keep Macs awake that run no stage.
    """
    engines = {m.name: _engine(m, f, environment, macs_sleep) for m, f in zip(plan.models, found, strict=True)}
    # Of an endpoint's own: two on one machine have different ports.
    batches = Batches(str(state_folder(os.environ) / f"batches-{plan.port}"), plan.url)
    ingress = serve.deployment(
        IngressReplica,
        name="ingress",
        num_replicas=plan.ingresses,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "resources": {HEAD: 0.001}},
        max_constructor_retry_count=MOST_STARTS,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=FAREWELL_S,
    )
    served = {
        m.name: Served(root_of(m.source, f.folder), _context(m, f), m.sleeps, m.scaling is not None)
        for m, f in zip(plan.models, found, strict=True)
    }
    on_demand = None
    if plan.on_demand is not None:
        assert plan.on_demand.memory is not None
        rules = Rules(plan.on_demand.memory, plan.on_demand.keep_s)
        on_demand = OnDemandModels(plan.on_demand.sizes, plan.on_demand.pins, rules)
    since, keys = int(time.time()), plan.api_keys
    return ingress.bind(
        plan.host, plan.port, plan.origins, engines, keys, batches, served, since, on_demand, plan.limits
    )


def _context(model: ModelPlan, found: Found) -> int | None:
    """Tokens of prompt and answer, as far as they are known without an engine; those of one on demand are."""
    said: int | None = model.engine_args.get("max_model_len")
    return found.profiles.stored.longest_context if said is None and model.on_demand else said


def _engine(model: ModelPlan, found: Found, environment: Mapping[str, str], on_head: bool) -> Application:
    # Only if need be: an actor with an environment of its own cannot use a process that Ray holds ready.
    variables, secrets = parted(environment)
    runtime_env = {"runtime_env": {"env_vars": variables}} if variables else {}
    where: dict[str, Any] = {"num_cpus": 0, "resources": {HEAD: 0.001}} if on_head else {"num_cpus": REPLICA_CPUS}
    count: dict[str, Any] = {"num_replicas": model.replicas}
    if model.scaling is not None:
        count = {"autoscaling_config": replica_scaling.config(model.scaling)}
    elif model.on_demand:
        count = {"autoscaling_config": replica_scaling.as_told(model.replicas)}
    options: dict[str, Any] = {
        **count,
        "name": deployment_name(model.name),
        "ray_actor_options": where | runtime_env,
        "max_ongoing_requests": MAX_REQUESTS,
        "request_router_config": RequestRouterConfig(
            request_router_class=ROUTER, request_router_kwargs={"holds": model.sleeps}
        ),
        "max_constructor_retry_count": MOST_STARTS,
        "health_check_period_s": 2,
        # Three in a row make a replica dead. An interpreter lock held for so long (imports) is before its start.
        "health_check_timeout_s": 3,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": 2 if model.scaling is None else DRAIN_S,
    }
    return serve.deployment(EngineReplica, **options).bind(model, found, secrets)
