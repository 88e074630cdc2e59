"""Serve's config files: the endpoint as an application that `serve deploy` takes (deploy/serve.example.yaml).

    args of the file --parse--> EndpointArgs --plan_of--> ServePlan --app.build--> Application

Ray runs the builder in a task of its own, and what it says when it refuses stands in `serve status`. Unlike `pomarium
serve`, which ends where an engine finds too few Macs, a deployed endpoint waits for them.
"""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pomarium.cluster.endpoint import api_keys
from pomarium.cluster.node.worker_environment import parted
from pomarium.cluster.placement.model import Network
from pomarium.cluster.rack import inventory
from pomarium.cluster.rack.placement_inputs import network_of
from pomarium.cluster.replica.engine_args import parse as parse_engine_args
from pomarium.cluster.replica.serve_plan import (
    ENDPOINT,
    MOST_INGRESSES,
    RACK_INGRESSES,
    Limits,
    ModelPlan,
    Scaling,
    ServePlan,
    served_names,
)
from pomarium.worker import settings
from pomarium.worker.errors import SettingsError


def _stages(value: Any) -> Any:
    return inventory.stages_of(value) if isinstance(value, str) else value


def _span(value: Any) -> Any:
    """A number of replicas is a span of itself."""
    return {"min": value, "max": value} if isinstance(value, int) else value


ON_DEMAND = frozenset({"on_demand", "pin", "pins", "memory", "keep"})
"""What `pomarium serve` is told of models on demand."""

ON_ONE_MACHINE = (
    "models are loaded on demand on one machine, by `pomarium serve --on-demand`; on a rack they come and go by "
    "`replicas: {min: 0, max: 1, keep: 10m}` of each model"
)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelArgs(_Strict):
    """A model.

    Attributes:
        source: a folder, GGUF file or id, or smollm2. A path has to exist on every Mac that runs a part of it.
        name: in requests; None takes it from the source, as `pomarium serve` does.
        stages: Macs per replica; None, in the file `auto`, as many as it takes.
        replicas: a number, or how few and how many as the load asks for them, as in rack.yaml.
        share_macs: stages of one replica may share a Mac.
        max_model_len: tokens of prompt and answer; None for the model's.
        streams: requests at once that a replica is planned for; None for as many as fit.
        engine_args: of vLLM, as on `pomarium serve`'s command line, each word an item.
    """

    source: Annotated[str, Field(min_length=1)]
    name: Annotated[str, Field(min_length=1)] | None = None
    stages: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_stages)] = None
    replicas: Annotated[inventory.ReplicasEntry, BeforeValidator(_span)] = inventory.ReplicasEntry()
    share_macs: bool = False
    max_model_len: Annotated[int, Field(ge=1)] | None = None
    streams: Annotated[int, Field(ge=1)] | None = None
    engine_args: tuple[str | int | float, ...] = ()


class EndpointArgs(_Strict):
    """What stands under `args` in the file.

    Attributes:
        models: at least one.
        api_key_file: a file on the head with the keys that requests may carry, one a line; None for none.
        api_key_variable: an environment variable with such a key. Without either, everybody is admitted.
        host, port: where the endpoint listens, on the head. ingresses: processes that take requests there.
        origins: of pages that browsers may let use it.
        failovers: how many engines a request may lose. failover_wait: how long it waits for another, such as 2m.
        rack: a rack.yaml on the head, whose links placement then knows.
    """

    models: Annotated[tuple[ModelArgs, ...], Field(min_length=1)]
    api_key_file: Annotated[str, Field(min_length=1)] | None = None
    api_key_variable: Annotated[str, Field(min_length=1)] | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    ingresses: Annotated[int, Field(ge=1, le=MOST_INGRESSES)] = RACK_INGRESSES
    origins: tuple[str, ...] = ()
    failovers: Annotated[int, Field(ge=0)] = Limits.times
    failover_wait: inventory.Duration = Limits.wait_s
    rack: str | None = None


def endpoint(args: dict[str, Any]) -> Any:
    """The application; `import_path: pomarium.cluster.endpoint.builder:endpoint`. Ray may call it on any Mac.

    Raises:
        SettingsError: an argument or a variable is not accepted.
        CheckpointError: a model is missing, damaged or of an unknown kind.
    """
    import ray

    from pomarium.cluster.endpoint import app

    parsed = parse(args)
    refuse_secrets(ray.get_runtime_context().runtime_env.get("env_vars", {}))
    # Models and the batches' folder are meant as on the head's disk, where `pomarium serve` would be run.
    on_head = ray.remote(num_cpus=0, resources={app.HEAD: 0.001}, max_retries=0)(_built)
    return ray.get(on_head.remote(parsed))


def _built(args: EndpointArgs) -> Any:
    from pomarium.cluster.endpoint import app
    from pomarium.cluster.rack import power_states
    from pomarium.cluster.replica import patience
    from pomarium.cluster.replica.model_check import Check

    settings.load(os.environ)
    plan = plan_of(args, os.environ)
    found = Check([model.source for model in plan.models]).found()
    # Nobody stands by who could be told that an engine finds too few Macs: it waits, and /health says what for.
    patience.came_up(ENDPOINT)
    return app.build(plan, found, {}, macs_sleep=bool(power_states.read_all()))


def refuse_secrets(variables: Mapping[str, str]) -> None:
    """Raises SettingsError if the application's runtime_env sets a secret."""
    _, secrets = parted(variables)
    for name in sorted(secrets.values):
        raise SettingsError(
            f"runtime_env.env_vars: {name} would stand in Ray's logs and process lists: name a file with the key in "
            f"args.api_key_file, or set {name} where `pomarium rack up` is run."
        )


def parse(args: Mapping[str, Any]) -> EndpointArgs:
    """`args` as the file has them. Raises SettingsError: one sentence for each fault."""
    try:
        return EndpointArgs.model_validate(dict(args))
    except ValidationError as error:
        faults = [dict(fault) for fault in error.errors(include_url=False)]
        raise SettingsError(" ".join(_fault(fault) for fault in faults if not _follows(fault, faults))) from None


def plan_of(args: EndpointArgs, environ: Mapping[str, str]) -> ServePlan:
    """The endpoint that `args` describe. Raises SettingsError."""
    network = None if args.rack is None else network_of(inventory.load(Path(args.rack)))
    models = tuple(_model(model, network) for model in args.models)
    for name, count in Counter(model.name for model in models).items():
        if count > 1:
            raise SettingsError(f"args: two models are called {name!r}: give one of them another `name`.")
    keys = _keys(args.api_key_variable, environ)
    if args.api_key_file is not None:
        keys |= api_keys.read(Path(args.api_key_file))
    limits = Limits(args.failovers, args.failover_wait)
    return ServePlan(models, args.host, args.port, keys, args.ingresses, args.origins, limits=limits)


def _model(args: ModelArgs, network: Network | None) -> ModelPlan:
    (name,) = served_names([args.source], [args.name] if args.name else [])
    engine_args = parse_engine_args([str(word) for word in args.engine_args])
    if args.max_model_len is not None:
        engine_args["max_model_len"] = args.max_model_len
    span = args.replicas
    if span.min > span.max:
        raise SettingsError(f"args.models: the replicas of {name!r} have a `min` that is more than their `max`.")
    plan = ModelPlan(
        name=name,
        source=args.source,
        engine_args=engine_args,
        stages=args.stages,
        share_macs=args.share_macs,
        streams=args.streams,
        network=network,
    )
    return plan.scaled(Scaling.of(span))


def _keys(variable: str | None, environ: Mapping[str, str]) -> frozenset[str]:
    if variable is None:
        return frozenset()
    if not environ.get(variable):
        raise SettingsError(
            f"args.api_key_variable: {variable} is not set where the application is built: set it where `pomarium rack "
            "up` is run, or name a file with the key in args.api_key_file."
        )
    return frozenset({environ[variable]})


def _follows(fault: dict[str, Any], faults: list[dict[str, Any]]) -> bool:
    """Whether it is said of a list because one of its items is faulty."""
    depth = len(fault["loc"])
    return any(len(other["loc"]) > depth and other["loc"][:depth] == fault["loc"] for other in faults)


def _fault(found: dict[str, Any]) -> str:
    kind, message = found["type"], found["msg"]
    path = "args" + "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in found["loc"])
    if kind == "extra_forbidden":
        return f"{path}: {ON_ONE_MACHINE if found['loc'][-1] in ON_DEMAND else 'this argument is unknown'}."
    if kind == "missing":
        return f"{path}: this argument is missing."
    if kind == "value_error":
        return f"{path}: {message.removeprefix('Value error, ')}."
    return f"{path}: {found['input']!r} is refused: {message[0].lower()}{message[1:]}."
