"""The options of `pomarium rack up` and `join`, and what they ask for. Every fault names its option."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pomarium.cluster.machine.units import parse_duration, parse_flops, parse_rate, parse_size
from pomarium.cluster.node.ray_node import GCS_PORT
from pomarium.cluster.rack import inventory, netns
from pomarium.cluster.rack.machine_facts import Known
from pomarium.cluster.rack.simulate import Simulation
from pomarium.cluster.rack.this_machine import Machine
from pomarium.worker.errors import SettingsError

T = TypeVar("T")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """What can be said of this machine."""
    parser.add_argument("--address", metavar="IP", help="of this machine in the rack (default: by the route)")
    parser.add_argument("--name", help="of this Mac in the rack (default: its host name)")
    parser.add_argument("--rack", type=Path, metavar="FILE", help="a rack.yaml that describes this Mac")
    parser.add_argument(
        "--memory", metavar="SIZE", help="that models may take for this machine's memory; with --simulate SIZE,..."
    )
    parser.add_argument("--bandwidth", metavar="RATE", help="from memory, such as 400GB/s (default: known or measured)")
    parser.add_argument("--flops", metavar="FLOPS", help="such as 14TFLOPS (default: known or measured)")
    parser.add_argument(
        "--tls",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="encrypt what passes between Macs (default: unless the address is loopback); the same on every Mac",
    )


def add_simulation(parser: argparse.ArgumentParser) -> None:
    """What can be said of a simulated rack."""
    group = parser.add_argument_group("a simulated rack")
    group.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help="N Macs on this machine, beside a head without one; on macOS it first names the loopback addresses to add",
    )
    group.add_argument("--cpus", metavar="CORES,...", help="cores that each Mac is held to, such as 0,1,0 or 0-1,2-3")
    group.add_argument(
        "--sleep",
        metavar="TIME",
        help="Macs begin asleep, wake for work, and sleep again after so long without any, such as 30s or 15m",
    )
    group.add_argument("--namespaces", action="store_true", help="give Macs a network of their own (Linux, root)")
    group.add_argument("--link-rate", metavar="RATE", help="of each Mac's link, such as 1Gb/s; with --namespaces")
    group.add_argument("--link-delay", metavar="TIME", help="one way between Macs, such as 0.3ms; with --namespaces")
    group.add_argument("--link-loss", metavar="PERCENT", help="of packets, such as 0.1%%; with --namespaces")


def machine_of(args: argparse.Namespace, worker: bool, keeps: bool = False) -> Machine:
    """What the options of `add_machine` say. keeps: as a head, its state. Raises SettingsError."""
    known = Known(
        name=args.name,
        memory_limit=_value("--memory", args.memory, parse_size),
        bandwidth=_value("--bandwidth", args.bandwidth, parse_rate),
        flops=_value("--flops", args.flops, parse_flops),
    )
    if known.memory_limit is not None and known.memory_limit < 1:
        raise SettingsError("--memory 0 leaves nothing for a model: give more.")
    entry = inventory.load(args.rack) if args.rack else None
    return Machine(known, entry, args.address, worker, args.tls, keeps=keeps)


def add_kept_state(parser: argparse.ArgumentParser) -> None:
    """Whether the head's state outlives its process."""
    parser.add_argument(
        "--keep-state",
        action="store_true",
        help="keep the state of Ray's head on disk, and start its process again when it ends (a head on Linux)",
    )


def keeps_state(args: argparse.Namespace) -> bool:
    """What --keep-state asks for. Raises SettingsError where Ray cannot do it."""
    if args.keep_state and not sys.platform.startswith("linux"):
        raise SettingsError(
            "--keep-state needs a head on Linux: Ray for macOS cannot keep the state of a head on disk. Leave it out."
        )
    return bool(args.keep_state)


def port_of(given: int | None) -> int:
    """Of the rack's head. Raises SettingsError."""
    port = GCS_PORT if given is None else given
    if not 1024 <= port <= 65535:
        raise SettingsError(f"--port {port} is not accepted: give one from 1024 to 65535.")
    return port


def simulation_of(args: argparse.Namespace) -> Simulation:
    """What --simulate and its options ask for. Raises SettingsError."""
    others = {"--port": args.port, "--address": args.address, "--name": args.name, "--rack": args.rack,
              "--bandwidth": args.bandwidth, "--flops": args.flops, "--tls": args.tls}  # fmt: skip
    if given := [option for option, value in others.items() if value is not None]:
        raise SettingsError(f"{given[0]} is not for a simulated rack: leave it or --simulate out.")
    memory = _value("--memory", args.memory, lambda text: _each(text, parse_size)) or ()
    cores = _value("--cpus", args.cpus, lambda text: _each(text, parse_cores)) or ()
    sleep = _value("--sleep", args.sleep, parse_duration)
    return Simulation(args.simulate, memory, cores, _link(args), sleep, keeps=keeps_state(args))


def refuse_simulation(args: argparse.Namespace) -> None:
    """Raises SettingsError for options of `add_simulation` without --simulate."""
    if given := [
        option for option, value in (("--cpus", args.cpus), ("--sleep", args.sleep), *_link_options(args)) if value
    ]:
        raise SettingsError(f"{given[0]} is for a simulated rack: give --simulate N with it.")


def _link(args: argparse.Namespace) -> netns.Link | None:
    if args.namespaces:
        return netns.Link(
            _value("--link-delay", args.link_delay, parse_duration) or 0.0,
            _value("--link-rate", args.link_rate, parse_rate),
            _value("--link-loss", args.link_loss, parse_share) or 0.0,
        )
    if given := [option for option, value in _link_options(args) if value]:
        raise SettingsError(
            f"{given[0]} needs --namespaces: the system does not slow, delay or lose what passes between loopback "
            "addresses."
        )
    return None


def _link_options(args: argparse.Namespace) -> tuple[tuple[str, object], ...]:
    return (
        ("--namespaces", args.namespaces),
        ("--link-rate", args.link_rate),
        ("--link-delay", args.link_delay),
        ("--link-loss", args.link_loss),
    )


def parse_cores(text: str) -> tuple[int, ...]:
    """Cores of one Mac: "1", or "0-1". Raises ValueError."""
    match = re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", text, re.ASCII)
    cores = tuple(range(int(match[1]), int(match[2] or match[1]) + 1)) if match else ()
    if not cores:
        raise ValueError(f"{text!r} is neither a core nor a span of cores such as 0-1")
    return cores


def parse_share(text: str) -> float:
    """0.001 of "0.1%". Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,2}(?:\.\d+)?)\s*%\s*", text, re.ASCII)
    if match is None:
        raise ValueError(f"{text!r} is not a share of packets such as 0.1%")
    return float(match[1]) / 100


def _each(text: str, parse: Callable[[str], T]) -> tuple[T, ...]:
    return tuple(parse(part.strip()) for part in text.split(","))


def _value(option: str, text: str | None, parse: Callable[[str], T]) -> T | None:
    """What `text` says; None if the option was not given. Raises SettingsError, which names the option."""
    if text is None:
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"{option}: {error}.") from error
