"""This machine as the head of a rack, or as one more Mac of one.

    up:   key, address, facts --> NodeSpec with the head --> started, recorded
    join: key, head, own address, facts --roster: right key, free name--> NodeSpec --> started, recorded

Nothing is started before everything that can be wrong was looked at, and nothing is left of what fails.
"""

import ipaddress
import secrets
import socket
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from pomarium.cluster.machine import listening
from pomarium.cluster.machine.state import state_folder
from pomarium.cluster.node import ports, ray_address, starting
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_folder import new_session_folder
from pomarium.cluster.node.ray_node import GCS_PORT, JOBS_PORT, NodeSpec, Ports
from pomarium.cluster.node.starting import Say
from pomarium.cluster.rack import current, machine_facts, teardown
from pomarium.cluster.rack.current import CurrentRack
from pomarium.cluster.rack.identity import RackKey, ray_token, write_tls
from pomarium.cluster.rack.inventory import Inventory
from pomarium.cluster.rack.labels import check_name, labels_of
from pomarium.cluster.rack.machine_facts import Known
from pomarium.worker import local_network
from pomarium.worker.errors import SettingsError

PAUSE_S = 1.0
"""Between looks for a head that is not up yet."""
TOLD_S = 30.0
"""The head's node and autoscaler are up seconds after its port is open."""
Prepare = Callable[[NodeSpec, str, Path], NodeSpec]
"""(the head's NodeSpec, HOST:PORT of the head, folder of the rack) -> NodeSpec with an autoscaler."""

TEST_ADDRESS = "192.0.2.1"
"""Of no machine (RFC 5737): the way to it is the way to the world. Nothing is sent."""


@dataclass(frozen=True)
class Machine:
    """What the user says of this machine.

    Attributes:
        known: facts. inventory: rack.yaml, which may know more.
        address: to listen on; None takes that of the route to the head, or to the world.
        worker: it runs stages. tls: None: exactly if the address is not loopback.
        ports: of its node. keeps: as a head, its state is on disk.
    """

    known: Known = field(default_factory=Known)
    inventory: Inventory | None = None
    address: str | None = None
    worker: bool = True
    tls: bool | None = None
    ports: Ports = field(default_factory=Ports)
    keeps: bool = False


def up(
    machine: Machine,
    port: int,
    key: RackKey,
    environ: MutableMapping[str, str],
    say: Say,
    prepare: Prepare | None = None,
) -> CurrentRack:
    """Start a rack whose head is this machine. Raises PomariumError.

    Args:
        prepare: gives the head its autoscaler; None for a rack whose Macs do not sleep.
    """
    address = own_address(machine.address, TEST_ADDRESS)
    if not listening.is_free(address, port):
        raise SettingsError(f"Port {port} of {address} is in use: end what listens there, or choose another --port.")
    if not listening.is_free(address, JOBS_PORT):
        raise SettingsError(f"Port {JOBS_PORT} of {address}, for jobs, is in use: end what listens there.")
    ports.require(machine.ports)
    spec = _spec(machine, address, environ, say)
    head = replace(spec, head=True, keeps=machine.keeps)
    return _start(head, f"{address}:{port}", machine, key, environ, say, prepare)


def join(
    machine: Machine, head: str, key: RackKey, environ: MutableMapping[str, str], say: Say, patient: bool = False
) -> CurrentRack:
    """Let this machine join the rack of `head`, HOST or HOST:PORT. Raises PomariumError.

    Args:
        patient: wait for a head that does not answer, instead of refusing.
    """
    rack = resolve(head)
    if patient:
        _await_head(rack, say)
    address = own_address(machine.address, rack.rpartition(":")[0])
    ports.require(machine.ports)
    if (fault := ray_address.fault(rack)) is not None:
        raise ray_address.no_rack(rack, fault) from fault
    spec = _spec(machine, address, environ, say)
    instance = _instance(spec.name, Membership("", rack, ray_token(key)), environ)
    return _start(replace(spec, instance=instance), rack, machine, key, environ, say)


def _await_head(rack: str, say: Say) -> None:
    """Return when something listens at HOST:PORT; tells why it waits, once for each reason."""
    told = ""
    while (fault := ray_address.fault(rack)) is not None:
        reason = local_network.explained(local_network.reason(fault), rack)
        if reason != told:
            say(f"waiting for the rack at {rack}: {reason}")
            told = reason
        time.sleep(PAUSE_S)


def resolve(head: str) -> str:
    """HOST or HOST:PORT as IP address and port. Raises SettingsError."""
    if head.startswith("[") or head.count(":") > 1:
        raise SettingsError(f"{head!r} is an IPv6 address, and racks use IPv4: give the head's IPv4 address.")
    host, colon, port = head.rpartition(":")
    host, port = (host, port) if colon else (head, str(GCS_PORT))
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise SettingsError(f"{head!r} is not the address of a rack's head: write HOST or HOST:PORT.")
    try:
        found = socket.getaddrinfo(host, int(port), socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise SettingsError(f"No address is known of {host!r} ({error}): give the head's IP address.") from error
    return f"{found[0][4][0]}:{port}"


def own_address(given: str | None, towards: str) -> str:
    """The address to listen on: the given one, else that of the route towards another machine. Raises SettingsError."""
    address = given if given is not None else _route(towards)
    try:
        ip = ipaddress.IPv4Address(address)
    except ValueError as error:
        raise SettingsError(f"--address {address!r} is not an IPv4 address of this machine.") from error
    if ip.is_unspecified or address == "127.0.0.1":
        raise SettingsError(
            f"{address} cannot be a rack's address: give one with --address that the other Macs reach (for a rack on "
            "this machine alone 127.0.0.2)."
        )
    ports.check_local(address)
    return address


def _route(towards: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((towards, 9))  # a datagram socket only looks the route up
        except OSError as error:
            raise SettingsError(
                f"This machine has no network ({error.strerror}): give its address in the rack with --address."
            ) from error
        return str(probe.getsockname()[0])


def _spec(machine: Machine, address: str, environ: MutableMapping[str, str], say: Say) -> NodeSpec:
    known = machine.known
    name = check_name(known.name) if known.name else machine_facts.own_name(socket.gethostname())
    if machine.inventory is not None and machine.worker:
        entry = machine_facts.known_of(machine.inventory, name, address)
        name, known = entry.name, machine_facts.merged(known, entry)
    labels: dict[str, str] = {}
    if machine.worker:
        facts = machine_facts.gather(known, name, environ)
        labels = labels_of(facts)
        say(machine_facts.sentence(facts))
    return NodeSpec(
        name, address, Path(), worker=machine.worker, labels=labels, memory=known.memory_limit, ports=machine.ports
    )


def _instance(name: str, membership: Membership, environ: MutableMapping[str, str]) -> str:
    """What the rack's autoscaler is to call this Mac; "" if it has none.

    Raises SettingsError: the name is taken, or not one of a rack where Macs sleep.
    """
    environ.update(membership.variables())  # before Ray is imported
    from pomarium.cluster.rack import power_states, reports, roster

    client = roster.connect(membership)
    if taken := roster.namesake(name, roster.read(client)):
        raise SettingsError(
            f"The rack has a Mac called {name} already, at {taken.address}: choose another --name, or end that one "
            "with `pomarium rack down` there (a Mac that was lost counts as gone after 8 s)."
        )
    reports.use(client)
    deadline = time.monotonic() + TOLD_S
    while (instance := power_states.instance_of(name, roster.read(client))) is None:
        if time.monotonic() > deadline:
            raise SettingsError(f"The head of the rack at {membership.address} is not up: look at its log there.")
        time.sleep(PAUSE_S)
    return instance


def _start(
    spec: NodeSpec,
    rack: str,
    machine: Machine,
    key: RackKey,
    environ: MutableMapping[str, str],
    say: Say,
    prepare: Prepare | None = None,
) -> CurrentRack:
    session = secrets.token_hex(4)
    loopback = ipaddress.IPv4Address(spec.address).is_loopback
    tls = None
    if machine.tls is True or (machine.tls is None and not loopback):
        tls = state_folder(environ) / f"tls-{session}"
    membership = Membership(session, rack, ray_token(key), tls, plaintext=machine.tls is False and not loopback)
    folder = new_session_folder(environ)
    spec = replace(spec, folder=folder / "0")
    found = CurrentRack(membership, (spec,), folder)
    try:
        if prepare is not None:
            found = replace(found, nodes=(prepare(spec, rack, folder),))
        if tls is not None:
            write_tls(key, tls)
        current.save(found, environ)  # first, so that `rack down` ends also what was interrupted half-way
        starting.bring_up(found.nodes, membership, environ, say)
    except BaseException:
        teardown.remove(found)
        current.forget(environ)
        raise
    return found
