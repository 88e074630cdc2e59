"""`pomarium rack probe`: measures the links of the running rack and prints them as rack.yaml writes them."""

import argparse
import os
from collections import Counter
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pomarium.cluster.node import ray_address
from pomarium.cluster.rack import inventory
from pomarium.worker.errors import SettingsError

if TYPE_CHECKING:
    from pomarium.cluster.executor.survey import RackNode

SECONDS = 1.0


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `probe` to the subcommands of `pomarium rack`."""
    parser = subparsers.add_parser(
        "probe",
        help="measure the links between the Macs of the running rack",
        description="Measures round trip and bandwidth from each Mac to each other one, through the service, "
        "encryption and kind of stream that tensors take between stages, and prints a table and the `links:` for "
        "rack.yaml. Exits 1 if a link could not be measured.",
        epilog="It may run while models are served; the figures are then what these leave.",
    )
    parser.add_argument(
        "--rack", type=Path, metavar="FILE", help="a rack.yaml whose names are to be used, found by the Macs' addresses"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        metavar="S",
        help="time for each direction of a link (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure every pair, one direction after the other: 0, or 1 if one could not be measured. Raises PomariumError."""
    if not 0 < args.seconds <= 60:
        raise SettingsError(f"--seconds {args.seconds:g} is not accepted: give more than 0 and at most 60.")
    rack_file = inventory.load(args.rack) if args.rack else None
    _connect(os.environ)
    from pomarium.cluster.executor import link_probe
    from pomarium.cluster.executor.survey import survey
    from pomarium.cluster.rack import link_report

    nodes = survey()
    names = names_of(nodes, rack_file)
    if len(nodes) < 2:
        raise SettingsError(f"The rack has {len(nodes)} running Mac(s) and a link needs two: let another one join.")
    print(link_report.header(names), flush=True)
    measured = []
    with link_probe.probers(nodes, names, os.environ) as probers:
        by_name = {prober.name: prober for prober in probers}
        for here, there in link_report.directions(names):
            measured.append(link_probe.measure(by_name[here], by_name[there], args.seconds))
            print(link_report.row(measured[-1], names), flush=True)
    if entry := link_report.entry(measured, names):
        print(f"\n{entry}")
    if rack_file and (absent := [mac.name for mac in rack_file.macs if mac.name not in names]):
        print(f"\nnot running: {', '.join(absent)}")
    return 1 if any(isinstance(one.result, str) for one in measured) else 0


def names_of(nodes: "Sequence[RackNode]", rack_file: inventory.Inventory | None) -> tuple[str, ...]:
    """What to call each node: its name in rack.yaml, else what it calls itself, else, of namesakes, its address."""
    known = {mac.address: mac.name for mac in rack_file.macs} if rack_file else {}
    names = [known.get(node.address, node.mac.name) for node in nodes]
    count = Counter(names)
    return tuple(name if count[name] == 1 else node.address for name, node in zip(names, nodes, strict=True))


def _connect(environ: MutableMapping[str, str]) -> None:
    """Connects to the rack that this machine belongs to, else to RAY_ADDRESS. Raises SettingsError."""
    from pomarium.cluster.rack import current

    current.enter(environ)
    address = environ.get("RAY_ADDRESS")
    if address is None:
        raise SettingsError(f"{current.NO_RACK.rstrip('.')}; or set RAY_ADDRESS to a running Ray.")
    ray_address.require(address)
    import ray

    ray.init(address=address, logging_level="WARNING", log_to_driver=False)
