"""A rack on one machine: N "Macs", each a Ray node with its own address, memory limit and cores, and a head of its own.

    Simulation --specs--> NodeSpecs of the head and the Macs --node.launch--> SimulatedRack
        .kill(name), .freeze(name), .thaw(name), .rejoin(name): what befalls a Mac
    with `sleep`: the head has an autoscaler, and each Mac is a process that sleeps until a magic packet wakes it

The head runs no workers and sits in the root network namespace, so that drivers and clients on this machine reach it: a
head without an accelerator. Macs have loopback addresses, or namespaces of their own (netns.py).
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import psutil

from pomarium.cluster.machine.version import own_version
from pomarium.cluster.node import kin, ports, ray_node, starting
from pomarium.cluster.node.kin import Kin
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.node.ray_folder import new_session_folder
from pomarium.cluster.node.ray_node import NodeSpec, Ports
from pomarium.cluster.node.starting import Say
from pomarium.cluster.rack import current as record
from pomarium.cluster.rack import netns, teardown
from pomarium.cluster.rack.current import CurrentRack
from pomarium.cluster.rack.identity import RackKey, ray_token, write_tls
from pomarium.cluster.rack.inventory import WAKE_DEADLINE_S, HeadEntry, Inventory, MacEntry, SleepEntry
from pomarium.cluster.rack.labels import MacFacts, facts_of, labels_of
from pomarium.cluster.rack.placement_inputs import cpu_model_memory
from pomarium.worker.errors import SettingsError

T = TypeVar("T")

Prepare = Callable[[NodeSpec, Inventory, str, Path], NodeSpec]
"""(the head's NodeSpec, the rack, HOST:PORT of the head, folder of the rack) -> NodeSpec with an autoscaler."""

SIMULATED_MAC = "pomarium.cluster.autoscaling.simulated_mac"
MOST = 64
HEAD = "head"
HEAD_ADDRESS = "127.0.0.254"
FIRST_HOST = 2
"""Macs are 127.0.0.2 and up; Ray rewrites 127.0.0.1."""
LOGICAL_CPUS = 4
"""Of each node, for Ray's book-keeping: they limit nothing."""
CHIP = "simulated"
BANDWIDTH, FLOPS = 10e9, 1e11
"""What a core of a rented machine reaches about; for all simulated Macs the same, so that plans do not vary."""


@dataclass(frozen=True)
class Simulation:
    """What to simulate.

    Attributes:
        macs: how many.
        memory: bytes for each; one value is for all; empty shares this machine's, with one part kept for the head.
        cores: that each is held to; empty for no limit.
        link: None for loopback addresses, else namespaces with this link.
        sleep: seconds without work before a Mac sleeps; all begin asleep. None: all are awake for good.
        always_awake: names of Macs that do not sleep. wake_deadline: seconds that a wake may take.
        keeps: the head's state is on disk.
    """

    macs: int
    memory: tuple[int, ...] = ()
    cores: tuple[tuple[int, ...], ...] = ()
    link: netns.Link | None = None
    sleep: float | None = None
    always_awake: tuple[str, ...] = ()
    wake_deadline: float = WAKE_DEADLINE_S
    keeps: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.macs <= MOST:
            raise SettingsError(f"--simulate {self.macs} is not accepted: give 1 to {MOST} Macs.")
        for option, given in (("--memory", self.memory), ("--cpus", self.cores)):
            if len(given) not in (0, 1, self.macs):
                raise SettingsError(
                    f"{option} has {len(given)} values for {self.macs} Macs: give one for all or one for each."
                )


def hardware_address(index: int) -> str:
    """Of the Mac with this number, from 1: a locally administered one."""
    return f"02:00:00:00:00:{index:02x}"


def inventory_of(nodes: Sequence[NodeSpec], simulation: Simulation, wake_port: int) -> Inventory:
    """rack.yaml of a simulated rack: of the head and the Macs in `nodes`."""
    macs = []
    for index, spec in enumerate(nodes):
        if not spec.worker:
            continue
        facts = facts_of(spec.labels)
        assert facts is not None
        macs.append(
            MacEntry(
                name=spec.name,
                address=spec.address,
                memory=facts.memory,
                model_memory=facts.model_memory,
                chip=facts.chip,
                bandwidth=facts.bandwidth,
                flops=facts.flops,
                hardware_address=hardware_address(index),
            )
        )
    sleep = SleepEntry(
        idle=simulation.sleep,
        always_awake=simulation.always_awake,
        wake_port=wake_port,
        wake_deadline=simulation.wake_deadline,
    )
    return Inventory(macs=tuple(macs), head=HeadEntry(address=nodes[0].address), sleep=sleep)


def specs(
    simulation: Simulation,
    folder: Path,
    total: int,
    network: netns.Addresses | None,
    node_ports: Sequence[Ports],
) -> tuple[NodeSpec, ...]:
    """The head and the Macs.

    Args:
        folder: of the rack. total: bytes of this machine's memory.
        network: addresses and namespaces; None for loopback.
        node_ports: of the head and each Mac.
    """
    count = simulation.macs
    memory = _each(simulation.memory, count) or (total // (count + 1),) * count
    cores = _each(simulation.cores, count) or ((),) * count
    head = NodeSpec(
        HEAD,
        network.head if network else HEAD_ADDRESS,
        folder / "0",
        head=True,
        worker=False,
        cpus=LOGICAL_CPUS,
        ports=node_ports[0],
        keeps=simulation.keeps,
    )
    macs = []
    for index in range(count):
        name = f"mac-{index + 1}"
        usable = cpu_model_memory(memory[index])
        facts = MacFacts(name, CHIP, memory[index], usable, BANDWIDTH, FLOPS, own_version())
        macs.append(
            NodeSpec(
                name,
                network.macs[index] if network else _address(index),
                folder / str(index + 1),
                labels=labels_of(facts),
                cpus=LOGICAL_CPUS,
                memory=memory[index],
                cores=cores[index],
                namespace=network.namespaces[index] if network else None,
                ports=node_ports[index + 1],
                logs=False,
            )
        )
    return (head, *macs)


def _begin_asleep(rack: CurrentRack, spec: NodeSpec, environ: Mapping[str, str]) -> None:
    """Start the process that the Mac is while it sleeps."""
    found = ray_node.mac_kin_of(spec, rack.membership.session)
    found.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    inside = ["ip", "netns", "exec", spec.namespace] if spec.namespace else []
    arguments = [str(rack.folder / record.RECORD), spec.name, str(rack.wake_port)]
    with (found.folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", SIMULATED_MAC, *arguments],
            env={**environ, found.variable: found.value},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    kin.record(found.folder, process.pid)


def _each(given: Sequence[T], count: int) -> tuple[T, ...]:
    return tuple(given) * count if len(given) == 1 else tuple(given)


@dataclass(frozen=True)
class SimulatedMac:
    """One of the rack. `address`: its own. `kin`: how its processes are found."""

    name: str
    address: str
    kin: Kin

    def pids(self) -> tuple[int, ...]:
        """Of all its processes now: raylet, agents, workers."""
        return tuple(process.pid for process in kin.members(self.kin))


class SimulatedRack:
    """A simulated rack that is up.

    Attributes:
        current: its addresses, token and nodes, as `pomarium rack up` records them.
    """

    def __init__(self, current: CurrentRack, environ: Mapping[str, str]) -> None:
        self.current = current
        self._environ = environ

    @property
    def macs(self) -> tuple[SimulatedMac, ...]:
        """In the order of their numbers, whether they run or not."""
        session = self.current.membership.session
        return tuple(
            SimulatedMac(spec.name, spec.address, ray_node.kin_of(spec, session))
            for spec in self.current.nodes
            if spec.worker
        )

    def environment(self) -> dict[str, str]:
        """What a driver on this machine needs in os.environ before Ray is imported."""
        return record.environment(self.current)

    def kill(self, name: str) -> None:
        """SIGKILL to the whole Mac, as if its power were lost. Returns when its processes are gone."""
        kin.end_all([self._mac_kin(name), self._kin(name)], 0.0)

    def crash(self, name: str) -> None:
        """SIGKILL to the Mac's node only: one that sleeps and wakes keeps its agent."""
        kin.kill(self._kin(name))

    def power_on(self, name: str) -> None:
        """After `kill` of a Mac that sleeps and wakes: it has power again, and sleeps."""
        _begin_asleep(self.current, self._spec(name), self._environ)

    def freeze(self, name: str) -> None:
        """SIGSTOP to the whole Mac: nothing answers, nothing is closed, as if its cable were lost."""
        kin.send(self._kin(name), signal.SIGSTOP)

    def thaw(self, name: str) -> None:
        """SIGCONT after `freeze`. Ray's node ends itself if the rack has given it up meanwhile."""
        kin.send(self._kin(name), signal.SIGCONT)

    def rejoin(self, name: str, version: str | None = None) -> None:
        """Start a Mac that was killed, or that ended, again; as if it ran `version`, if one is given.

        Raises NodeStartError, SettingsError if it still runs.
        """
        if kin.members(self._kin(name)):
            raise SettingsError(f"{name} still runs: kill it before it joins again.")
        spec = self._spec(name)
        if version is not None and (facts := facts_of(spec.labels)) is not None:
            spec = replace(spec, labels=labels_of(replace(facts, version=version)))
        starting.bring_up([spec], self.current.membership, self._environ, lambda _: None)

    def down(self) -> None:
        """End every process and remove every file and network. Raises NodeStartError if a process does not end."""
        teardown.remove(self.current)

    def _mac_kin(self, name: str) -> Kin:
        return ray_node.mac_kin_of(self._spec(name), self.current.membership.session)

    def _kin(self, name: str) -> Kin:
        return ray_node.kin_of(self._spec(name), self.current.membership.session)

    def _spec(self, name: str) -> NodeSpec:
        for spec in self.current.nodes:
            if spec.worker and spec.name == name:
                return spec
        raise SettingsError(f"There is no Mac {name!r} in the rack: it has {', '.join(m.name for m in self.macs)}.")


def start(
    simulation: Simulation,
    key: RackKey,
    environ: Mapping[str, str],
    say: Say = lambda _: None,
    begin: Callable[[CurrentRack], None] = lambda _: None,
    prepare: Prepare | None = None,
) -> SimulatedRack:
    """Start a simulated rack; nothing is left if that fails. Raises NodeStartError, SettingsError.

    Args:
        say: is told of each node that is up.
        begin: is told of the rack before its first process starts.
        prepare: gives the head its autoscaler; needed if Macs are to sleep.
    """
    check(simulation)
    folder = new_session_folder(environ)
    network = None
    rack = None
    try:
        if simulation.link is not None:
            network = netns.build(simulation.macs, simulation.link)
        free = ports.free(ports.PER_NODE * (simulation.macs + 1) + 2)
        nodes = specs(simulation, folder, int(psutil.virtual_memory().total), network, ports.deal(free[2:]))
        if prepare is not None:
            head = prepare(nodes[0], inventory_of(nodes, simulation, free[1]), f"{nodes[0].address}:{free[0]}", folder)
            nodes = (head, *nodes[1:])
        tls = None
        if network is not None:
            tls = folder / "tls"
            write_tls(key, tls)
        membership = Membership(secrets.token_hex(4), f"{nodes[0].address}:{free[0]}", ray_token(key), tls)
        made = None if network is None else record.Network(network.bridge, network.namespaces)
        port = free[1] if simulation.sleep is not None else None
        rack = CurrentRack(membership, nodes, folder, simulated=True, network=made, wake_port=port)
        record.write(rack, folder / record.RECORD)
        begin(rack)
        starting.bring_up(nodes[:1], membership, environ, say)
        if simulation.sleep is None:
            starting.bring_up(nodes[1:], membership, environ, say)
        for spec in nodes[1:] if simulation.sleep is not None else ():
            _begin_asleep(rack, spec, environ)
            say(f"{spec.name} is asleep at {spec.address}")
    except BaseException:
        if rack is not None:
            teardown.remove(rack)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            if network is not None:
                netns.remove(network.bridge, network.namespaces)
        raise
    return SimulatedRack(rack, environ)


@contextmanager
def simulated(
    macs: int,
    memory: Sequence[int] = (),
    cores: Sequence[tuple[int, ...]] = (),
    link: netns.Link | None = None,
    environ: Mapping[str, str] = os.environ,
) -> Iterator[SimulatedRack]:
    """A simulated rack while the context is open. It is not recorded as this machine's."""
    rack = start(Simulation(macs, tuple(memory), tuple(cores), link), RackKey.generate(), environ)
    try:
        yield rack
    finally:
        rack.down()


def check(simulation: Simulation) -> None:
    """What can be told before anything is made. Raises SettingsError."""
    _check_cores(simulation.cores)
    if simulation.link is None:
        ports.check_loopback([HEAD_ADDRESS, *(_address(index) for index in range(simulation.macs))])


def _address(index: int) -> str:
    """Of the Mac with this number, from 0, where it has no network of its own."""
    return f"127.0.0.{FIRST_HOST + index}"


def _check_cores(cores: Sequence[tuple[int, ...]]) -> None:
    if not any(cores):
        return
    if not sys.platform.startswith("linux"):
        raise SettingsError("--cpus needs Linux: macOS holds no process to cores.")
    if shutil.which("taskset") is None:
        raise SettingsError("--cpus needs `taskset`: install util-linux.")
    there = os.sched_getaffinity(0)
    if absent := sorted({core for one in cores for core in one} - there):
        raise SettingsError(
            f"--cpus names core {absent[0]}, and this machine has {', '.join(map(str, sorted(there)))}."
        )
