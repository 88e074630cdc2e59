"""`pomarium serve`: from the command line to an endpoint that answers, until Ctrl-C or SIGTERM.

    arguments, rack.yaml --plan_of--> ServePlan --session.serving--> endpoint --wait--> clean end

Whatever can be known to be wrong without starting anything is found first: settings, arguments, port, checkpoints.
"""

import argparse
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from pomarium.cluster.cli import serve_options
from pomarium.cluster.cli.interrupts import Interrupts, phases
from pomarium.cluster.cli.progress import Terminal, log_file, quiet
from pomarium.cluster.cli.serve_options import KEY_VARIABLE
from pomarium.cluster.endpoint import beforehand
from pomarium.cluster.endpoint.api_keys import read as read_keys
from pomarium.cluster.machine import disk, listening
from pomarium.cluster.provision import platform_choice
from pomarium.cluster.rack import current, inventory
from pomarium.cluster.rack.placement_inputs import network_of
from pomarium.cluster.replica import download, model_folder, parsers
from pomarium.cluster.replica.serve_plan import (
    RACK_INGRESSES,
    ModelPlan,
    OnDemandPlan,
    Scaling,
    ServePlan,
    served_names,
)
from pomarium.worker import settings
from pomarium.worker.address import authority
from pomarium.worker.errors import SettingsError
from pomarium.worker.models import hub, look_up

if TYPE_CHECKING:
    from pomarium.cluster.endpoint.watch import Watch
    from pomarium.cluster.replica.model_check import Found

EMBEDDED_NAME = "smollm2"
POLL_S = 1.0
"""How often the endpoint's state is looked at, to report an engine's loss and return."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="serve models through an OpenAI-compatible endpoint",
        usage="pomarium serve [MODEL ... | --models FOLDER] [options] [vLLM engine arguments]",
        description="Serves each MODEL (a folder, a GGUF file, or an id of Hugging Face or ModelScope; without one the "
        "embedded SmolLM2-135M-Instruct) at http://HOST:PORT/v1: on the rack that is up on this machine (`pomarium "
        "rack up`), else on the Ray at RAY_ADDRESS, else on a Ray of its own.",
        epilog="All other arguments go to vLLM, for example --max-num-seqs 32, --dtype float32; "
        "`vllm serve --help=all` lists them. They apply to every model. What reads tool calls and reasoning is chosen "
        "from the model's chat template: --tool-call-parser NAME and --reasoning-parser NAME change it, with `none` to "
        "have none.",
        allow_abbrev=False,
    )
    serve_options.add(parser)
    parser.set_defaults(run=run, passes_through=True)


def run(args: argparse.Namespace) -> int:
    """Serve until told to stop: 0.

    Raises PomariumError for everything that the user can change, KeyboardInterrupt if told before it is ready.
    """
    with quiet(log_file("serve")) as terminal, Interrupts(lambda: terminal.say("stopping ...")) as interrupts:
        started = time.monotonic()
        choose_wire(args, os.environ)
        if not args.no_rack:
            current.enter()
        plan = plan_of(args, os.environ)
        plan = _checked(plan, terminal, os.environ)
        fetch(plan.models, terminal, os.environ)
        terminal.say(f"log      {terminal.log}")
        from pomarium.cluster.endpoint import lifecycle

        phase = phases(terminal, interrupts, own_ray=not os.environ.get("RAY_ADDRESS"))
        with interrupts.held(), lifecycle.serving(plan, phase, say=terminal.say) as (plan, found):
            interrupts.check()
            from pomarium.cluster.endpoint import watch

            watched = watch.Watch(terminal.say, watch.look, watch.head_answers)
            watched.step()  # what is lost right after "ready" is told too
            terminal.say(f"ready    {time.monotonic() - started:5.1f} s\n\n{welcome(plan, found)}\n")
            with suppress(KeyboardInterrupt), interrupts.raising():
                _wait(watched)
        terminal.say("stopped")
    return 0


def _checked(plan: ServePlan, terminal: Terminal, environ: Mapping[str, str]) -> ServePlan:
    """The plan without the models of a folder that cannot be served. Raises as beforehand.check, and SettingsError."""
    left_out = beforehand.check(plan.models, environ)
    for name, reason in left_out.items():
        terminal.say(f"{name} is left out: {reason}")
    return replace(plan, models=tuple(model for model in plan.models if model.name not in left_out))


def choose_wire(args: argparse.Namespace, environ: MutableMapping[str, str]) -> None:
    """Hand --wire on as workers read it; it travels to them with the other settings."""
    if args.wire is not None:
        environ[settings.WIRE] = args.wire


def fetch(models: Sequence[ModelPlan], terminal: Terminal, environ: Mapping[str, str]) -> None:
    """Have Hugging Face's models whole on this machine, with a bar for each that is not. Raises CheckpointError."""
    if settings.load(environ).use_modelscope:
        return
    for source in dict.fromkeys(model.source for model in models):
        if source is None or source in look_up.EMBEDDED or look_up.local(source) is not None:
            continue
        folder = hub.snapshot(hub.root_of(source))
        if folder is None or not hub.is_whole(folder):
            terminal.say(f"fetch    {source}")
            download.fetch(source, terminal.out)


def plan_of(args: argparse.Namespace, environ: Mapping[str, str]) -> ServePlan:
    """The endpoint that the command line describes, checked as far as is possible without starting anything.

    Raises:
        SettingsError: a variable or argument is not accepted, or the port is taken.
        UnsupportedError: vLLM would take another platform than ours.
        DiskFullError: there is no room for logs or temporary files.
        CheckpointError: a model is named by a path where nothing is.
    """
    settings.load(environ)
    platform_choice.require(environ)
    disk.require(disk.ray_parent(environ), environ)  # torch cannot be imported on a full one
    check_port(args.host, args.port)
    ingresses = args.ingresses
    if ingresses is None:
        ingresses = RACK_INGRESSES if environ.get("RAY_ADDRESS") else 1
    queue, keys = serve_options.queue(args), api_keys(args, environ)
    models = tuple(replace(model, queue=queue) for model in models_of(args, environ))
    on_demand = _on_demand(args, models, environ)
    if on_demand is not None:
        models = tuple(replace(m, on_demand=True, replicas=int(m.name in on_demand.pins)) for m in models)
    origins, limits = tuple(args.allow_origin), serve_options.limits(args)
    return ServePlan(models, args.host, args.port, keys, ingresses, origins, on_demand, limits)


def models_of(args: argparse.Namespace, environ: Mapping[str, str]) -> list[ModelPlan]:
    """The models of `plan_of`, whatever serves them. Raises as it does."""
    models, engine_tokens = split_extra(args.extra)
    in_folder = _in_folder(args, models)
    if args.max_model_len is not None and args.max_model_len < 1:
        raise SettingsError(f"--max-model-len {args.max_model_len} admits no prompt: give at least 1.")
    scaling = _scaling(args)
    on_rack = bool(environ.get("RAY_ADDRESS"))
    stages = _stages(args, on_rack)
    for model in models:
        look_up.local(model)
    from pomarium.cluster.replica.engine_args import parse

    engine_args = parse(engine_tokens)
    if args.max_model_len is not None:
        engine_args["max_model_len"] = args.max_model_len
    rack = inventory.load(args.rack) if args.rack is not None else None
    network = None if rack is None else network_of(rack)
    common = ModelPlan("", None, engine_args, 1, stages, args.share_macs, None, network)
    if scaling is not None:
        common = common.scaled(scaling)
    if in_folder:
        plans = [replace(common, name=name, source=path, optional=True) for name, path in in_folder.items()]
    elif rack is not None and not models:
        plans = _plans_of(rack, args, common)
    else:
        sources: list[str | None] = [*models] or [None]
        named = zip(_names(models, args.served_name), sources, strict=True)
        plans = [replace(common, name=name, source=source) for name, source in named]
    for plan in plans:
        if not on_rack and plan.scaling is not None:
            raise SettingsError(
                f"{plan.name} is to have {plan.scaling.minimum} to {plan.scaling.maximum} engines as the load asks for "
                "them, which takes a rack: start one with `pomarium rack up`, or give one number with --replicas."
            )
        if not on_rack and not plan.share_macs and (plan.stages or 1) > 1:
            raise SettingsError(
                f"{plan.name} is to run on {plan.stages} Macs and this is one: start a rack with `pomarium rack up`, "
                "or add --share-macs to run all stages here."
            )
    return plans


def _in_folder(args: argparse.Namespace, models: Sequence[str]) -> Mapping[str, str]:
    """The models of --models, by name. Raises SettingsError."""
    if args.models is None:
        return {}
    if models:
        raise SettingsError(f"--models takes all models of a folder: leave out {models[0]}, or name each model.")
    if args.served_name:
        raise SettingsError("--served-name has no place with --models: the folder names them.")
    return {name: str(path) for name, path in model_folder.models_in(args.models).items()}


def _on_demand(
    args: argparse.Namespace, models: Sequence[ModelPlan], environ: Mapping[str, str]
) -> OnDemandPlan | None:
    """What --on-demand and its like say. Raises SettingsError."""
    if not args.on_demand:
        for option, given in (("--pin", args.pin), ("--memory", args.memory)):
            if given:
                raise SettingsError(f"{option} is for models that come and go: give --on-demand with it.")
        return None
    if environ.get("RAY_ADDRESS"):
        raise SettingsError(
            "--on-demand is for one machine: on a rack models come and go with --replicas 0-1 --keep TIME; or serve "
            "from this machine alone, with --no-rack."
        )
    if not settings.load(environ).use_mlx:
        raise SettingsError("--on-demand counts MLX's memory: leave out VLLM_METAL_USE_MLX=0.")
    if args.replicas is not None or any((model.stages or 1) > 1 for model in models):
        raise SettingsError("--on-demand has one engine of each model at most: leave out --replicas and --stages.")
    if (args.ingresses or 1) > 1:
        raise SettingsError("--on-demand takes one ingress, which knows of every request: leave out --ingresses.")
    for name in args.pin:
        if name not in [model.name for model in models]:
            raise SettingsError(f"--pin {name}: no such model; there are {', '.join(m.name for m in models)}.")
    keep = serve_options.keep_of(args)
    return OnDemandPlan(keep, frozenset(args.pin), serve_options.memory_of(args))


def _scaling(args: argparse.Namespace) -> Scaling | None:
    """What --replicas and --keep say; None: nothing. One number is a span of itself."""
    if args.replicas is None:
        if args.keep is not None and not args.on_demand:
            raise SettingsError(
                "--keep is for engines that come and go: give --replicas MIN-MAX with it, or --on-demand."
            )
        return None
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", args.replicas, re.ASCII)
    if match is None:
        raise SettingsError(f"--replicas {args.replicas!r} is neither a number nor a span such as 0-2.")
    low, high = int(match[1]), int(match[2] or match[1])
    if high < 1:
        raise SettingsError(f"--replicas {args.replicas} serves nothing: give at least 1.")
    if low > high:
        raise SettingsError(f"--replicas {args.replicas} is empty: give the smaller number first.")
    if low == high and args.keep is not None:
        raise SettingsError("--keep is for engines that come and go: give --replicas MIN-MAX with it.")
    return Scaling(low, high, keep_s=serve_options.keep_of(args))


def _names(models: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    if models:
        return served_names(models, given)
    if len(given) > 1:
        raise SettingsError("--served-name was given more than once for the one embedded model.")
    return given or [EMBEDDED_NAME]


def _stages(args: argparse.Namespace, on_rack: bool) -> int | None:
    if args.stages is None:
        return None if on_rack else 1
    try:
        return inventory.stages_of(args.stages)
    except ValueError as error:
        raise SettingsError(f"--stages: {error}.") from None


def _plans_of(rack: inventory.Inventory, args: argparse.Namespace, common: ModelPlan) -> list[ModelPlan]:
    """The models of a rack file. What the command line says goes before what the file says."""
    if not rack.models:
        raise SettingsError(f"{args.rack} names no models: name one on the command line, or add `models:` to it.")
    if args.served_name:
        raise SettingsError("--served-name has no place with a rack file's models: they have names there.")
    return [
        replace(
            common if args.replicas is not None else common.scaled(Scaling.of(entry.replicas)),
            name=entry.name,
            source=entry.source,
            engine_args={**({"max_model_len": entry.context} if entry.context else {}), **common.engine_args},
            stages=common.stages if args.stages is not None else entry.stages,
            streams=entry.streams,
        )
        for entry in rack.models
    ]


def api_keys(args: argparse.Namespace, environ: Mapping[str, str]) -> frozenset[str]:
    """The keys that requests may carry; none if everybody may ask. Raises SettingsError: see `--api-key-file`."""
    keys = frozenset(key for key in [*args.api_key, environ.get(KEY_VARIABLE, "")] if key)
    return keys if args.api_key_file is None else keys | read_keys(args.api_key_file)


def split_extra(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """(models, engine arguments): models are what comes before the first argument that begins with a dash."""
    first = next((i for i, token in enumerate(tokens) if token.startswith("-")), len(tokens))
    return list(tokens[:first]), list(tokens[first:])


def check_port(host: str, port: int) -> None:
    """Raises SettingsError unless `host`:`port` can be listened on."""
    if not 0 < port < 65536:
        raise SettingsError(f"--port {port} is not a port: give one from 1 to 65535.")
    try:
        listening.check(host, port)
    except socket.gaierror as e:
        raise SettingsError(f"--host {host} is no address of this machine ({e.strerror}).") from e
    except OSError as e:
        raise SettingsError(
            f"Cannot listen on {authority(host, port)} ({e.strerror}): choose another with --port or --host."
        ) from e


def welcome(plan: ServePlan, found: Sequence["Found"] = ()) -> str:
    """URL, a request to try, and what reads the answers of each model found."""
    key = ' -H "Authorization: Bearer $KEY"' if plan.api_keys else ""
    messages = '[{"role": "user", "content": "What is the capital of France?"}]'
    body = f'{{"model": "{plan.models[0].name}", "messages": {messages}, "max_tokens": 100, "temperature": 0}}'
    names = ", ".join(m.name for m in plan.models)
    loads = " when they are asked for" if plan.on_demand is not None else ""
    several = len(plan.models) > 1
    read = [
        f"{f'{model.name}: ' if several else ''}{parsers.in_force(one.parsers, model.engine_args)}; {parsers.HINT}\n"
        for model, one in zip(plan.models, found, strict=False)
    ]
    return (
        f"{''.join(read)}{plan.url}/v1 serves {names}{loads}; Ctrl-C stops it. Try:\n"
        f"curl {plan.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )


def _wait(watched: "Watch") -> NoReturn:
    """Until interrupted, tell of what becomes of the endpoint. Raises HeadLostError."""
    while True:
        time.sleep(POLL_S)
        watched.step()
