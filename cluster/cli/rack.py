"""`pomarium rack`: bring a rack up, let Macs join, look at it, measure it, take it down.

arguments --rack_options.py--> Machine or Simulation --cluster/rack/--> lines for people
"""

import argparse
import importlib
import json
import os
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from pomarium.cluster.autoscaling.setup import for_simulated, with_autoscaler
from pomarium.cluster.cli import rack_options
from pomarium.cluster.cli.interrupts import Interrupts
from pomarium.cluster.machine.state import state_folder
from pomarium.cluster.machine.units import format_size
from pomarium.cluster.node import ray_node
from pomarium.cluster.node.ray_node import GCS_PORT, NodeSpec
from pomarium.cluster.node.starting import NodeStartError
from pomarium.cluster.rack import current, inventory, key_file, simulate, teardown, this_machine
from pomarium.cluster.rack.current import CurrentRack
from pomarium.cluster.rack.identity import RackKey
from pomarium.cluster.rack.this_machine import Machine
from pomarium.worker.errors import SettingsError

BACK_S, HEAD_LOOK_S = 15.0, 0.2
"""For how long a head that keeps its state may be without its process, which is started again; between looks at it."""
STAY_S = 2.0
"""Between looks at the head's node."""


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
    up.add_argument(
        "--stay",
        action="store_true",
        help="stay in the foreground, as launchd wants it: end the rack with this command, and this command with it",
    )
    rack_options.add_machine(up)
    rack_options.add_kept_state(up)
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
    join.add_argument(
        "--stay",
        action="store_true",
        help="stay in the foreground as this Mac's agent: join as soon as the rack is there, join again whenever the "
        "node has ended, and put the Mac to sleep when the rack lets it",
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
    for module in ("rack_drain", "rack_probe"):
        importlib.import_module(f"pomarium.cluster.cli.{module}").add_parser(commands)
    check = commands.add_parser("check", help="check a rack.yaml, and start nothing")
    check.add_argument("file", type=Path, metavar="FILE", help="the rack's description")
    check.set_defaults(run=run_check)


def run_up(args: argparse.Namespace) -> int:
    """`rack up`. Raises PomariumError."""
    teardown.require_none(os.environ)
    if args.simulate is not None:
        return _up_simulated(args)
    rack_options.refuse_simulation(args)
    machine = rack_options.machine_of(args, worker=not args.no_worker, keeps=rack_options.keeps_state(args))
    port = rack_options.port_of(args.port)
    key = key_file.made(os.environ)
    with Interrupts():
        rack = this_machine.up(machine, port, key, os.environ, _say, _autoscaler(machine))
        for line in invitation(rack, key):
            _say(line)
        return _stay(rack) if args.stay else 0


def _autoscaler(machine: Machine) -> this_machine.Prepare | None:
    """What gives the head an autoscaler, if rack.yaml says when Macs sleep."""
    rack = machine.inventory
    if rack is None or rack.sleep.idle is None:
        return None

    def prepare(spec: NodeSpec, address: str, folder: Path) -> NodeSpec:
        own = next((mac.name for mac in rack.macs if spec.name == mac.name or spec.address == mac.address), None)
        return with_autoscaler(spec, rack, own, address, folder, state_folder(os.environ))

    return prepare


def _stay(rack: CurrentRack) -> int:
    """Until the head's node ends, which is a failure, or this command is told to end."""
    try:
        while ray_node.runs(rack.nodes[0], rack.membership.session):
            if not _headed(rack):
                teardown.down(os.environ)
                raise NodeStartError("Ray's head process (GCS) has ended, and so the rack was taken down.")
            time.sleep(STAY_S)
    except KeyboardInterrupt:
        teardown.down(os.environ)
        return 0
    teardown.down(os.environ)
    raise NodeStartError("The node of the rack's head has ended.")


def _headed(rack: CurrentRack) -> bool:
    """Whether the node has its head, or gets it back in a moment."""
    head = rack.nodes[0]
    deadline = time.monotonic() + (BACK_S if head.keeps else 0.0)
    while not ray_node.heads(head, rack.membership.session):
        if time.monotonic() > deadline:
            return False
        time.sleep(HEAD_LOOK_S)
    return True


def _up_simulated(args: argparse.Namespace) -> int:
    simulation = rack_options.simulation_of(args)
    simulate.check(simulation)
    key = key_file.made(os.environ)
    with Interrupts():
        try:
            prepare = None if simulation.sleep is None else for_simulated()
            rack = simulate.start(simulation, key, os.environ, _say, _record, prepare).current
        except BaseException:
            current.forget(os.environ)
            raise
        limits = ", ".join(format_size(spec.memory) for spec in rack.nodes if spec.memory is not None)
        asleep = "" if simulation.sleep is None else ", asleep"
        print(f"{simulation.macs} simulated Mac(s) with {limits}{asleep}; the head at {rack.address} runs no stages")
        _say("next: `pomarium serve`; also `pomarium rack status` and `pomarium rack down`")
        return _stay(rack) if args.stay else 0


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
        rack = this_machine.join(machine, args.head, key, os.environ, _say, patient=args.stay)
        key_file.store(key, os.environ)
        if args.stay:
            with suppress(KeyboardInterrupt):
                _be_agent(rack)
            return 0
    print(f"joined the rack at {rack.address}; leave it with `pomarium rack down`")
    return 0


def _be_agent(rack: CurrentRack) -> NoReturn:
    """Until KeyboardInterrupt: this command is told to end."""
    from pomarium.cluster.autoscaling import agent, sleep
    from pomarium.cluster.autoscaling.head_view import HeadView

    def asleep() -> None:
        if not sleep.nap(sleep.ways()):
            _say("this Mac was told to sleep and did not; joining again")

    def rouse() -> None:
        sleep.rouse(_say)

    _say(f"joined the rack at {rack.address}")
    head, spec = HeadView(rack.membership, _say), rack.nodes[0]
    try:
        agent.Agent(spec, rack.membership, head, os.environ, asleep, _say, running=True, rouse=rouse).run()
    finally:
        teardown.down(os.environ)


def run_status(args: argparse.Namespace) -> int:
    """`rack status`: 0, or 1 if a Mac is lost. Raises PomariumError."""
    rack = current.enter()
    if rack is None:
        raise SettingsError(current.NO_RACK)
    if not _headed(rack):
        raise NodeStartError(
            "Ray's head process (GCS) has ended: the rack serves for a minute at most. Take it down with "
            "`pomarium rack down`, and start it again with `pomarium rack up`."
        )
    from pomarium.cluster.rack import look, reports, roster, status

    client = roster.connect(rack.membership)
    reports.use(client)
    found = look.look(client, rack.address, rack.simulated, str(rack.folder))
    print(json.dumps(status.document(found), indent=1) if args.json else status.text(found))
    return 1 if found.lost or found.missing else 0


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
