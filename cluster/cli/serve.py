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
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from pomarium.cluster.cli.interrupts import Interrupts, phases
from pomarium.cluster.cli.progress import Terminal, log_file, quiet
from pomarium.cluster.endpoint import beforehand
from pomarium.cluster.endpoint.api_keys import read as read_keys
from pomarium.cluster.machine import disk, listening, units
from pomarium.cluster.provision import platform_choice
from pomarium.cluster.rack import current, inventory
from pomarium.cluster.rack.inventory import KEEP_S
from pomarium.cluster.rack.placement_inputs import network_of
from pomarium.cluster.replica import download, parsers
from pomarium.cluster.replica.serve_plan import RACK_INGRESSES, Limits, ModelPlan, Scaling, ServePlan, served_names
from pomarium.worker import settings
from pomarium.worker.address import authority
from pomarium.worker.errors import SettingsError
from pomarium.worker.models import hub, look_up

if TYPE_CHECKING:
    from pomarium.cluster.endpoint.watch import Watch
    from pomarium.cluster.replica.model_check import Found

KEY_VARIABLE = "POMARIUM_API_KEY"
EMBEDDED_NAME = "smollm2"
POLL_S = 1.0
"""How often the endpoint's state is looked at, to report an engine's loss and return."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="serve models through an OpenAI-compatible endpoint",
        usage="pomarium serve [MODEL ...] [options] [vLLM engine arguments]",
        description="Serves each MODEL (a folder, a GGUF file, or an id of Hugging Face or ModelScope; without one the "
        "embedded SmolLM2-135M-Instruct) at http://HOST:PORT/v1: on the rack that is up on this machine (`pomarium "
        "rack up`), else on the Ray at RAY_ADDRESS, else on a Ray of its own.",
        epilog="All other arguments go to vLLM, for example --max-num-seqs 32, --dtype float32; "
        "`vllm serve --help=all` lists them. They apply to every model. What reads tool calls and reasoning is chosen "
        "from the model's chat template: --tool-call-parser NAME and --reasoning-parser NAME change it, with `none` to "
        "have none.",
        allow_abbrev=False,
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default: %(default)s)")
    parser.add_argument(
        "--ingresses",
        type=int,
        metavar="N",
        help="processes that take requests, all behind the one port: a busy endpoint needs more than one, and when one "
        f"is lost the streams of the others go on (default: {RACK_INGRESSES} on a rack, else 1)",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let browsers use the endpoint from pages of this origin, such as https://chat.example, or * for all; may "
        "be repeated (default: from none)",
    )
    parser.add_argument(
        "--failovers",
        type=int,
        default=Limits.times,
        metavar="N",
        help="how many engines a request may lose and still be answered by another; 0: it ends with its engine "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--failover-wait",
        default=f"{Limits.wait_s:g}s",
        metavar="TIME",
        help="how long it waits for another, such as 2m (default: %(default)s)",
    )
    parser.add_argument(
        "--replicas",
        metavar="N|MIN-MAX",
        help="engines per model, or how few and how many as the load asks for them, such as 0-2: with 0 all Macs may "
        "sleep (default: 1, or what the rack file says)",
    )
    parser.add_argument(
        "--keep",
        metavar="TIME",
        help="with MIN-MAX: how long an engine is kept after it was last needed, such as 10m "
        f"(default: {KEEP_S / 60:g}m, or what the rack file says)",
    )
    parser.add_argument(
        "--stages",
        metavar="N",
        help="Macs per engine, each with a part of the model's layers, or auto: as many as it takes (default: auto on "
        "a rack, else 1)",
    )
    parser.add_argument(
        "--share-macs", action="store_true", help="stages of one engine may share a Mac, or this machine without a rack"
    )
    parser.add_argument(
        "--rack",
        type=Path,
        metavar="FILE",
        help="rack.yaml: its links are used for placement, and without a MODEL its models are served",
    )
    parser.add_argument(
        "--no-rack", action="store_true", help="serve from this machine alone also while a rack is up on it"
    )
    parser.add_argument(
        "--served-name",
        action="append",
        default=[],
        metavar="NAME",
        help="the model's name in requests; once per MODEL",
    )
    parser.add_argument(
        "--max-model-len", type=int, metavar="TOKENS", help="longest prompt plus answer (default: the model's)"
    )
    parser.add_argument(
        "--wire",
        choices=list(settings.Wire),
        help="on a Mac: off wires nothing; pool wires weights and KV pool, once, against a model that grows slow when "
        "macOS takes it for idle (default: POMARIUM_WIRE, or off)",
    )
    parser.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help=f"a key that requests must carry; may be repeated. {KEY_VARIABLE} does not show up in process lists",
    )
    parser.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="such keys, one a line, in a file that only its owner reads"
    )
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
        beforehand.check(plan.models, os.environ)
        fetch(plan.models, terminal, os.environ)
        terminal.say(f"log      {terminal.log}")
        from pomarium.cluster.endpoint import lifecycle

        phase = phases(terminal, interrupts, own_ray=not os.environ.get("RAY_ADDRESS"))
        with interrupts.held(), lifecycle.serving(plan, phase) as found:
            interrupts.check()
            from pomarium.cluster.endpoint import watch

            watched = watch.Watch(terminal.say, watch.look, watch.head_answers)
            watched.step()  # what is lost right after "ready" is told too
            terminal.say(f"ready    {time.monotonic() - started:5.1f} s\n\n{welcome(plan, found)}\n")
            with suppress(KeyboardInterrupt), interrupts.raising():
                _wait(watched)
        terminal.say("stopped")
    return 0


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
    try:
        limits = Limits(args.failovers, units.parse_duration(args.failover_wait))
    except ValueError as error:
        raise SettingsError(f"--failover-wait: {error}.") from None
    models, keys = tuple(models_of(args, environ)), api_keys(args, environ)
    return ServePlan(models, args.host, args.port, keys, ingresses, tuple(args.allow_origin), limits)


def models_of(args: argparse.Namespace, environ: Mapping[str, str]) -> list[ModelPlan]:
    """The models of `plan_of`, whatever serves them. Raises as it does."""
    models, engine_tokens = split_extra(args.extra)
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
    if rack is not None and not models:
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


def _scaling(args: argparse.Namespace) -> Scaling | None:
    """What --replicas and --keep say; None: nothing. One number is a span of itself."""
    if args.replicas is None:
        if args.keep is not None:
            raise SettingsError("--keep is for engines that come and go: give --replicas MIN-MAX with it.")
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
    try:
        keep = KEEP_S if args.keep is None else units.parse_duration(args.keep)
    except ValueError as error:
        raise SettingsError(f"--keep: {error}.") from None
    return Scaling(low, high, keep_s=keep)


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
    several = len(plan.models) > 1
    read = [
        f"{f'{model.name}: ' if several else ''}{parsers.in_force(one.parsers, model.engine_args)}; {parsers.HINT}\n"
        for model, one in zip(plan.models, found, strict=False)
    ]
    return (
        f"{''.join(read)}{plan.url}/v1 serves {names}; Ctrl-C stops it. Try:\n"
        f"curl {plan.url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
    )


def _wait(watched: "Watch") -> NoReturn:
    """Until interrupted, tell of what becomes of the endpoint. Raises HeadLostError."""
    while True:
        time.sleep(POLL_S)
        watched.step()
