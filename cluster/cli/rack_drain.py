"""`pomarium rack drain NAME` and `undrain`: lets one Mac go without losing an answer, and takes that back.

    drain_check.refusal --no--> drains.tell: its engines leave, none is placed there --> Ray's own drain of the node
        --> the last engines of a model, whose own processes are there, leave when others serve --> the node ends: free

Ray's drain keeps all that Ray places off the node, and ends the node once it is idle; it cannot be taken back, so with
--wait it comes when the engines are gone.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from pomarium.cluster.machine.units import parse_duration
from pomarium.cluster.node.starting import NodeStartError
from pomarium.cluster.rack import current
from pomarium.cluster.rack.current import CurrentRack
from pomarium.worker.errors import SettingsError

if TYPE_CHECKING:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    from pomarium.cluster.rack.roster import Member
    from pomarium.cluster.rack.status import RackStatus

LOOK_S = 0.5
TURN_S = 120.0
"""How long the last engine of a model, whose own process is on the Mac, waits for another one to serve."""
LEAVE_S = 30.0
"""How long engines have for what they take half a second for, on a machine that has other things to do."""
REASON = "pomarium rack drain"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `drain` and `undrain` to the subcommands of `pomarium rack`."""
    drain = subparsers.add_parser(
        "drain",
        help="let one Mac go: nothing new is placed there, and what runs there goes on elsewhere",
        description="Run it on the head. The Mac's engines take no requests any more; their answers go on at other "
        "engines at once, or with --wait to their end. Then the engines end, are placed anew on the Macs that are "
        "left, and the Mac's node ends: the Mac is free. It is in the rack again once it joins again.",
    )
    drain.add_argument("name", metavar="NAME", help="of the Mac, as `pomarium rack status` shows it")
    drain.add_argument(
        "--wait",
        metavar="TIME",
        help="let answers go on there so long, such as 30s or 15m, before others take them over (default: not at all)",
    )
    drain.set_defaults(run=run_drain)
    undrain = subparsers.add_parser(
        "undrain",
        help="take a drain back: let the Mac join again",
        description="Run it on the head. A Mac whose engines still answer (--wait) stays; one that is free already "
        "joins again by itself if its agent runs (`pomarium rack join --stay`), else by `pomarium rack join` there.",
    )
    undrain.add_argument("name", metavar="NAME", help="of the Mac")
    undrain.set_defaults(run=run_undrain)


def run_drain(args: argparse.Namespace) -> int:
    """`rack drain`: returns when the Mac is free. Raises PomariumError."""
    wait_s = _seconds(args.wait)
    _, client, look = _entered()
    from pomarium.cluster.rack import drain_check, drains
    from pomarium.cluster.rack.drains import Drain

    found = look()
    if (said := drain_check.refusal(args.name, found, wait=wait_s > 0)) is not None:
        raise SettingsError(said)
    mac = next(mac for mac in found.macs if mac.name == args.name)
    spared = drain_check.spared(mac, found)
    drain = Drain(mac.name, mac.node, time.time() + wait_s if wait_s else 0.0, spared)
    drains.tell(drain)
    holds = drain_check.held(mac, found)
    _say(f"{mac.name} takes nothing new" + (f"; {len(holds)} engine(s) leave it: {', '.join(holds)}" if holds else ""))
    if wait_s:
        _until(lambda: not drain_check.held(mac, look()), wait_s + LEAVE_S)
    _tell_ray(client, mac)
    if spared:  # which Serve is about to replace, since Ray has told it
        _until(lambda: not drain_check.spared(mac, look()), TURN_S)
        drains.tell(replace(drain, spared=()))
    if not _until(lambda: drain_check.freed(mac.name, look()), LEAVE_S):
        left = ", ".join(drain_check.held(mac, look())) or "no engine, but something of Ray's"
        raise NodeStartError(
            f"{mac.name} is not free after {LEAVE_S:g} s: {left} is still there. It ends when that does; `pomarium "
            "rack status` shows it as drained then."
        )
    _say(f"{mac.name} is free: its node has ended. `pomarium rack undrain {mac.name}` lets it join again.")
    return 0


def run_undrain(args: argparse.Namespace) -> int:
    """`rack undrain`. Raises PomariumError."""
    rack, _, look = _entered()
    from pomarium.cluster.rack import drain_check, drains, simulate
    from pomarium.cluster.rack.status import DRAINED, DRAINING

    found = look()
    mac = next((mac for mac in found.macs if mac.name == args.name), None)
    if mac is None:
        raise SettingsError(drain_check.unknown(args.name, found))
    if (state := found.state_of(mac)) not in (DRAINING, DRAINED):
        raise SettingsError(f"{mac.name} is {state} and not drained: there is nothing to take back.")
    drains.withdraw(mac.name)
    if state == DRAINING:
        _say(f"{mac.name} stays in the rack, unless its node is ending already: look with `pomarium rack status`.")
    elif rack.simulated:
        simulated = simulate.SimulatedRack(rack, os.environ)
        _until(lambda: not any(one.name == mac.name and one.pids() for one in simulated.macs), LEAVE_S)
        simulated.rejoin(mac.name)
        _say(f"{mac.name} has joined again")
    else:
        _say(f"{mac.name} joins again if its agent runs; else run `pomarium rack join` there.")
    return 0


def _entered() -> "tuple[CurrentRack, GcsClient, Callable[[], RackStatus]]":
    """The rack that is up on this machine, a client of its head, and what looks at it. Raises SettingsError."""
    rack = current.enter()
    if rack is None:
        raise SettingsError(current.NO_RACK)
    from pomarium.cluster.rack import look, reports, roster

    client = roster.connect(rack.membership)
    reports.use(client)
    return rack, client, lambda: look.look(client, rack.address, rack.simulated, str(rack.folder))


def _tell_ray(client: "GcsClient", mac: "Member") -> None:
    """Raises NodeStartError if Ray does not take it, which it has no reason to."""
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    preempted = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # the only one that is not refused by a node that works
    taken, said = client.drain_node(mac.node, preempted, REASON, 0, timeout=LEAVE_S)
    if not taken:
        raise NodeStartError(f"Ray does not drain {mac.name}: {said}")


def _until(over: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not over():
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


def _seconds(text: str | None) -> float:
    try:
        return 0.0 if text is None else parse_duration(text)
    except ValueError as error:
        raise SettingsError(f"--wait: {error}.") from error


def _say(text: str) -> None:
    print(text, flush=True)
