"""`pomarium rack`: bring a rack up, let Macs join, look at it, measure it, take it down.

arguments --rack_options.py--> Machine or Simulation --cluster/rack/--> lines for people
"""

import argparse
import importlib
import json
import os
import shlex
from pathlib import Path

from pomarium.cluster.cli import rack_options
from pomarium.cluster.cli.interrupts import Interrupts
from pomarium.cluster.rack import current, inventory, key_file, simulate, teardown, this_machine
from pomarium.cluster.rack.current import CurrentRack
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.rack.node import GCS_PORT
from pomarium.cluster.rack.units import format_size
from pomarium.cluster.version import own_version
from pomarium.worker.errors import SettingsError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `rack` to the command line."""
    parser = subparsers.add_parser(
        "rack",
        help="bring up a rack of Macs, or a simulated one, and look at it",
        description="A rack is one Ray: a head, and the Macs that joined it. While one is up on this machine, "
        "`pomarium serve` serves from it.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    up = commands.add_parser(
        "up",
        help="start a rack here: its head and, unless told otherwise, its first Mac",
        description="Starts Ray's head on this machine, in the background, makes the rack's key, and prints what lets "
        "other Macs join. With --simulate the whole rack is on this machine.",
    )
    up.add_argument("--port", type=int, help=f"of the rack's head (default: {GCS_PORT})")
    up.add_argument("--no-worker", action="store_true", help="this machine is the head only and runs no stages")
    rack_options.add_machine(up)
    rack_options.add_simulation(up)
    up.set_defaults(run=run_up)
    join = commands.add_parser(
        "join",
        help="let this Mac join a rack",
        description="Starts a node of the rack on this machine, in the background.",
    )
    join.add_argument("head", metavar="HEAD[:PORT]", help=f"address of the rack's head (default port: {GCS_PORT})")
    join.add_argument(
        "--key", help=f"the rack's key; else {key_file.KEY_VARIABLE}, the key on file, or what you type is taken"
    )
    rack_options.add_machine(join)
    join.set_defaults(run=run_join)
    status = commands.add_parser("status", help="show the Macs, their stages, the replicas, memory and tokens/s")
    status.add_argument("--json", action="store_true", help="as JSON: sizes in bytes")
    status.set_defaults(run=run_status)
    env = commands.add_parser("env", help='print what Ray\'s own commands need: eval "$(pomarium rack env)"')
    env.set_defaults(run=run_env)
    down = commands.add_parser("down", help="end what this machine runs for the rack; nothing is left")
    down.set_defaults(run=run_down)
    importlib.import_module("pomarium.cluster.cli.rack_probe").add_parser(commands)
    check = commands.add_parser("check", help="check a rack.yaml, and start nothing")
    check.add_argument("file", type=Path, metavar="FILE", help="the rack's description")
    check.set_defaults(run=run_check)


def run_up(args: argparse.Namespace) -> int:
    """`rack up`. Raises PomariumError."""
    teardown.require_none(os.environ)
    if args.simulate is not None:
        return _up_simulated(args)
    rack_options.refuse_simulation(args)
    machine = rack_options.machine_of(args, worker=not args.no_worker)
    port = rack_options.port_of(args.port)
    key = key_file.made(os.environ)
    with Interrupts():
        rack = this_machine.up(machine, port, key, os.environ, _say)
    for line in invitation(rack, key):
        print(line)
    return 0


def _up_simulated(args: argparse.Namespace) -> int:
    simulation = rack_options.simulation_of(args)
    key = key_file.made(os.environ)
    with Interrupts():
        try:
            rack = simulate.start(simulation, key, os.environ, _say, _record).current
        except BaseException:
            current.forget(os.environ)
            raise
    limits = ", ".join(format_size(spec.memory) for spec in rack.nodes if spec.memory is not None)
    print(f"{simulation.macs} simulated Mac(s) with {limits}; the head at {rack.address} runs no stages")
    print("next: `pomarium serve`; also `pomarium rack status` and `pomarium rack down`")
    return 0


def invitation(rack: CurrentRack, key: RackKey) -> list[str]:
    """What to do next, the key among it: whoever reads it may join."""
    host, _, port = rack.address.rpartition(":")
    head = host if port == str(GCS_PORT) else rack.address
    return [
        "on each further Mac, to join:",
        f"  pomarium rack join {head} --key {key.text}",
        "then, here: pomarium serve",
    ]


def run_join(args: argparse.Namespace) -> int:
    """`rack join`. Raises PomariumError."""
    teardown.require_none(os.environ)
    machine = rack_options.machine_of(args, worker=True)
    key = key_file.known(args.key, os.environ, key_file.terminal())
    with Interrupts():
        rack = this_machine.join(machine, args.head, key, os.environ, _say)
    key_file.store(key, os.environ)
    print(f"joined the rack at {rack.address}; leave it with `pomarium rack down`")
    return 0


def run_status(args: argparse.Namespace) -> int:
    """`rack status`: 0, or 1 if a Mac is lost. Raises PomariumError."""
    rack = current.enter()
    if rack is None:
        raise SettingsError(current.NO_RACK)
    from pomarium.cluster.rack import reports, roster, status

    client = roster.connect(rack.membership)
    reports.use(client)
    members, serving, waiting = roster.read(client), reports.read_all(), reports.read_waiting()
    found = status.RackStatus(rack.address, rack.simulated, members, serving, own_version(), waiting)
    print(json.dumps(status.document(found), indent=1) if args.json else status.text(found))
    return 0 if all(mac.alive for mac in found.macs) else 1


def run_env(_: argparse.Namespace) -> int:
    """`rack env`: lines for a shell, the rack's token among them. Raises PomariumError."""
    rack = current.current(os.environ)
    if rack is None:
        raise SettingsError(current.NO_RACK)
    for name, value in current.for_ray_commands(rack).items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def run_down(_: argparse.Namespace) -> int:
    """`rack down`. Raises PomariumError."""
    with Interrupts() as interrupts:
        interrupts.ignore()  # half an end is none
        rack = teardown.down(os.environ)
    print("no rack was up on this machine" if rack is None else f"ended {len(rack.nodes)} node(s) of {rack.address}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """`rack check`. Raises SettingsError."""
    found = inventory.load(args.file)
    print(f"{args.file}: {len(found.macs)} Mac(s), {len(found.models)} model(s), no fault found")
    return 0


def _record(rack: CurrentRack) -> None:
    current.save(rack, os.environ)


def _say(text: str) -> None:
    print(text, flush=True)
