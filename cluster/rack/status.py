"""The state of a rack as text and as JSON. Pure.

Members (roster.py), replicas (reports.py), sleeping Macs (power_states.py), Ray Serve's processes (serve_actors.py)
                                                                                --look.py--> RackStatus
    RackStatus --text--> tables for people
               --document--> what `rack status --json` prints, and the endpoint's page reads
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from pomarium.cluster.machine.units import format_size
from pomarium.cluster.rack import drains, serve_actors
from pomarium.cluster.rack.drains import Drain
from pomarium.cluster.rack.labels import facts_of
from pomarium.cluster.rack.mac_power import LOST, MacPower, Power, without_node
from pomarium.cluster.rack.reports import LossReport, ReplicaReport, StageReport, WaitingReport
from pomarium.cluster.rack.roster import Member
from pomarium.cluster.rack.serve_actors import Part, ServeActor

ALIVE, DRAINING, DRAINED = "alive", "draining", "drained"


@dataclass(frozen=True)
class RackStatus:
    """Attributes:
    address: of Ray's head. simulated: all on one machine.
    members: of the rack. replicas: that serve from it. waiting: replicas that lack Macs.
    powers: of the Macs of a rack where these sleep; empty for another.
    version: of Pomarium and Python here; Macs of another one serve nothing.
    actors: Ray Serve's processes, the oldest first. losses: the last of each model.
    disk: a sentence on a full disk of this machine; None: all have room.
    at: when all of this was read, Unix seconds. memory: of the machine that read it, bytes.
    drains: Macs that are to be let go.
    """

    address: str
    simulated: bool
    members: tuple[Member, ...]
    replicas: tuple[ReplicaReport, ...]
    version: str
    waiting: tuple[WaitingReport, ...] = ()
    powers: tuple[MacPower, ...] = ()
    actors: tuple[ServeActor, ...] = ()
    losses: tuple[LossReport, ...] = ()
    disk: str | None = None
    at: float = 0.0
    memory: int | None = None
    drains: tuple[Drain, ...] = ()

    @property
    def unserved(self) -> tuple[LossReport, ...]:
        """What models that nobody serves were lost of, or do not start for."""
        served = {report.model for report in self.serving}
        return tuple(loss for loss in self.losses if self.missing and loss.model not in served)

    @property
    def serving(self) -> tuple[ReplicaReport, ...]:
        """Replicas that have told of themselves of late and whose processes Ray has not seen end since."""
        gone = serve_actors.gone(self.actors)
        return tuple(report for report in self.replicas if report.replica not in gone)

    @property
    def missing(self) -> tuple[Part, ...]:
        """What the endpoint does not serve without."""
        return serve_actors.missing(self.actors, {report.replica for report in self.serving})

    @property
    def macs(self) -> tuple[Member, ...]:
        """Members that run workers, and Macs that the rack has put to sleep or would wake."""
        known = {member.name for member in self.members if member.facts is not None}
        away = [
            Member(mac.name, mac.address, False, False, facts_of(mac.labels))
            for mac in self.powers
            if mac.name not in known
        ]
        return (*(member for member in self.members if member.facts is not None), *away)

    @property
    def hosts(self) -> tuple[Member, ...]:
        """Machines that are no Macs of the rack and run stages all the same: of a Ray that is no rack, such as the own
        one of `pomarium serve`. They go by their addresses."""
        used = {stage.mac for report in self.serving for stage in report.stages}
        plain = [member for member in self.members if member.facts is None and member.address in used]
        return tuple(replace(member, name=member.address) for member in plain)

    @property
    def lost(self) -> tuple[Member, ...]:
        """Macs that are neither there nor asleep."""
        return tuple(mac for mac in self.macs if self.state_of(mac) == LOST)

    def state_of(self, member: Member) -> str:
        """ "alive", "draining", "drained", "lost", or what the autoscaler says of a Mac that is not there
        (rack.mac_power.Power)."""
        if member.alive:
            return DRAINING if drains.of_nodes(self.drains, [member.node]) else ALIVE
        if member.drained:
            return DRAINED
        return without_node(next((mac.state for mac in self.powers if mac.name == member.name), None))


def text(status: RackStatus) -> str:
    """Tables for people."""
    alive = sum(mac.alive for mac in status.macs)
    kind = "simulated rack" if status.simulated else "rack"
    asleep = sum(status.state_of(mac) == Power.ASLEEP for mac in status.macs)
    sleeping = f", {asleep} asleep" if status.powers else ""
    lines = [f"{kind} at {status.address}: {alive} of {len(status.macs)} Macs alive{sleeping}", ""]
    lines += _aligned(_mac_rows(status))
    if reasons := [f"{mac.name} is {mac.state}: {mac.reason}" for mac in status.powers if mac.reason]:
        lines += ["", *reasons]
    if status.serving:
        lines += ["", *_aligned(_replica_rows(status.serving))]
    elif not status.waiting and not status.missing:
        lines += ["", "no model is served"]
    if status.waiting:
        lines += ["", *(f"{report.model} waits for Macs: {report.reason}" for report in status.waiting)]
    if status.missing:
        lines += ["", *(f"the endpoint does not serve: {part}" for part in status.missing)]
        lines += [f"{loss.model}: {loss.reason}" for loss in status.unserved]
    if status.disk:
        lines += ["", status.disk]
    return "\n".join(lines)


def document(status: RackStatus) -> dict[str, object]:
    """What --json prints and the endpoint's page reads: sizes in bytes, layers as half-open ranges."""
    reasons = {mac.name: mac.reason for mac in status.powers if mac.reason}
    macs = [
        {
            "name": mac.name,
            "address": mac.address,
            "alive": mac.alive,
            "state": status.state_of(mac),
            "reason": reasons.get(mac.name),
            "head": mac.head,
            **_facts(mac, status),
            "stages": [asdict(stage) | {"model": replica.model, "replica": replica.replica}
                       for replica, stage in _stages_on(mac.name, status.serving)],
        }
        for mac in (*status.macs, *status.hosts)
    ]  # fmt: skip
    return {
        "at": status.at,
        "version": status.version,
        "address": status.address,
        "simulated": status.simulated,
        "macs": macs,
        "replicas": [asdict(replica) for replica in status.serving],
        "waiting": [asdict(report) for report in status.waiting],
        "missing": [asdict(part) for part in status.missing],
        "losses": [asdict(loss) for loss in status.unserved],
        "disk": status.disk,
    }


def _facts(mac: Member, status: RackStatus) -> dict[str, object]:
    """What a Mac's labels tell of it; of a host without any its memory, if it is the machine that looks: the head."""
    if mac.facts is not None:
        return {name: value for name, value in asdict(mac.facts).items() if name != "name"}
    return {"memory": status.memory} if mac.head and status.memory is not None else {}


def _mac_rows(status: RackStatus) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("Mac", "address", "chip", "memory", "for models", "state", "stages")]
    heads = [member for member in status.members if member.facts is None]
    for member in (*heads, *sorted(status.macs, key=lambda mac: (not mac.head, mac.name))):
        state = status.state_of(member) + (", head" if member.head else "")
        if member.facts is not None and member.facts.version != status.version:
            state += f", runs {member.facts.version}: left out"
        if member.facts is None:
            rows.append((member.name, member.address, "-", "-", "-", state, "runs no stages"))
            continue
        stages = [_stage(replica, stage) for replica, stage in _stages_on(member.name, status.serving)]
        sizes = (format_size(member.facts.memory), format_size(member.facts.model_memory))
        rows.append((member.name, member.address, member.facts.chip, *sizes, state, "; ".join(stages) or "-"))
    return rows


def _replica_rows(replicas: Sequence[ReplicaReport]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("model", "replica", "layers", "memory", "running", "waiting", "tokens/s")]
    for replica in replicas:
        layers = ", ".join(f"{_span(stage)} on {stage.mac}" for stage in replica.stages)
        memory = format_size(sum(stage.memory for stage in replica.stages))
        rates = (str(replica.running), str(replica.waiting), f"{replica.tokens_per_s:.1f}")
        rows.append((replica.model, replica.replica, layers, memory, *rates))
    return rows


def _stages_on(mac: str, replicas: Sequence[ReplicaReport]) -> list[tuple[ReplicaReport, StageReport]]:
    return [(replica, stage) for replica in replicas for stage in replica.stages if stage.mac == mac]


def _stage(replica: ReplicaReport, stage: StageReport) -> str:
    return f"{replica.model} {_span(stage)} of {replica.layers}, {format_size(stage.memory)}"


def _span(stage: StageReport) -> str:
    """Layers as people count them here: from 0, both ends named."""
    return f"{stage.first}-{stage.end - 1}"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows]
