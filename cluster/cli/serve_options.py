"""The options of `pomarium serve`, in groups, and what some of them ask for. Every fault names its option."""

import argparse
from pathlib import Path

from pomarium.cluster.machine import units
from pomarium.cluster.rack.inventory import KEEP_S
from pomarium.cluster.replica.serve_plan import RACK_INGRESSES, Limits, Queue
from pomarium.worker import settings
from pomarium.worker.errors import SettingsError

KEY_VARIABLE = "POMARIUM_API_KEY"


def add(parser: argparse.ArgumentParser) -> None:
    """Adds all of them."""
    _add_address(parser)
    _add_engines(parser)
    _add_queue(parser)
    _add_models(parser)
    _add_on_demand(parser)
    _add_keys(parser)


def _add_address(parser: argparse.ArgumentParser) -> None:
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


def limits(args: argparse.Namespace) -> Limits:
    """What --failovers and --failover-wait say. Raises SettingsError."""
    try:
        return Limits(args.failovers, units.parse_duration(args.failover_wait))
    except ValueError as error:
        raise SettingsError(f"--failover-wait: {error}.") from None


def _add_engines(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--replicas",
        metavar="N|MIN-MAX",
        help="engines per model, or how few and how many as the load asks for them, such as 0-2: with 0 all Macs may "
        "sleep (default: 1, or what the rack file says)",
    )
    parser.add_argument(
        "--keep",
        metavar="TIME",
        help="with MIN-MAX or --on-demand: how long an engine is kept after it was last needed, such as 10m "
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


def _add_queue(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-waiting",
        type=int,
        metavar="N",
        help="requests that may wait for a model's engines before one; what would come behind more gets 429 (default: "
        "four for each that the engines run, at least 256)",
    )
    parser.add_argument(
        "--max-waiting-tokens",
        type=int,
        metavar="N",
        help="likewise, tokens of their prompts, counted as 4 characters each (default: what the engines' KV caches "
        "hold)",
    )
    parser.add_argument(
        "--max-wait",
        metavar="TIME",
        help="how long a request may have to wait for an engine, such as 10s; what would wait longer gets 429 "
        "(default: as long as an answer takes, at least 10s, in a burst; where more comes than can be done, as long "
        "as a first token takes)",
    )
    parser.add_argument(
        "--request-timeout",
        metavar="TIME",
        help="how long an answer may take, waiting included, where the request does not say it with X-Request-Timeout "
        "(default: without end)",
    )


def queue(args: argparse.Namespace) -> Queue:
    """What --max-waiting and its like say. Raises SettingsError."""
    for option, value in (("--max-waiting", args.max_waiting), ("--max-waiting-tokens", args.max_waiting_tokens)):
        if value is not None and value < 0:
            raise SettingsError(f"{option} {value} is less than none.")
    wait_s = _seconds("--max-wait", args.max_wait)
    timeout_s = _seconds("--request-timeout", args.request_timeout)
    if timeout_s == 0:
        raise SettingsError(f"--request-timeout {args.request_timeout} leaves no time for an answer.")
    return Queue(args.max_waiting, args.max_waiting_tokens, wait_s, timeout_s)


def _seconds(option: str, given: str | None) -> float | None:
    try:
        return None if given is None else units.parse_duration(given)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}.") from None


def _add_models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", metavar="FOLDER", help="serve all models in a folder; what cannot be served is left out with a line"
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


def _add_on_demand(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-demand",
        action="store_true",
        help="load models when they are asked for; the one that was not used for longest leaves when memory is short",
    )
    parser.add_argument(
        "--pin",
        action="append",
        default=[],
        metavar="NAME",
        help="with --on-demand: load this model at the start, and keep it; may be repeated",
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="with --on-demand: what models may take of this machine's memory, such as 24GiB (default: what is free)",
    )


def _add_keys(parser: argparse.ArgumentParser) -> None:
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


def keep_of(args: argparse.Namespace) -> float:
    """Seconds that an engine is kept which nobody needs. Raises SettingsError."""
    try:
        return KEEP_S if args.keep is None else units.parse_duration(args.keep)
    except ValueError as error:
        raise SettingsError(f"--keep: {error}.") from None


def memory_of(args: argparse.Namespace) -> int | None:
    """Bytes for models on demand; None: nothing was said. Raises SettingsError."""
    try:
        memory = None if args.memory is None else units.parse_size(args.memory)
    except ValueError as error:
        raise SettingsError(f"--memory: {error}.") from None
    if memory is not None and memory < 1:
        raise SettingsError(f"--memory {args.memory} leaves nothing for models.")
    return memory
