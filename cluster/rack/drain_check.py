"""Whether a Mac can be drained, and what it still holds. Pure.

RackStatus --refusal--> a sentence, or None: it can
           --held, spared--> the engines that have a part there, and those of them that are to go last
"""

from collections.abc import Iterable

from pomarium.cluster.rack.reports import ReplicaReport
from pomarium.cluster.rack.roster import Member
from pomarium.cluster.rack.serve_actors import ENGINE
from pomarium.cluster.rack.status import ALIVE, DRAINED, DRAINING, RackStatus


def refusal(name: str, status: RackStatus, wait: bool = False) -> str | None:
    """Why the Mac of this name cannot be drained, if so. wait: its answers are to end there."""
    mac = next((mac for mac in status.macs if mac.name == name), None)
    if mac is None:
        return unknown(name, status)
    if mac.head:
        return (
            f"{name} is the rack's head, without which nothing of the rack runs: it cannot be drained. `pomarium rack "
            "down` there ends the rack."
        )
    if any(member.autoscaler for member in status.members):
        return (
            f"Macs sleep in this rack, and what wakes them would wake {name} again: take it out of rack.yaml on the "
            "head, and start the rack anew."
        )
    if (state := status.state_of(mac)) not in (ALIVE, DRAINING):
        return f"{name} is {state}: there is nothing to drain."
    for replica in status.serving:
        if (said := _homeless(mac, replica, status)) is not None:
            return said
    return _without_others(mac, status) if wait else None


def unknown(name: str, status: RackStatus) -> str:
    """There is no such Mac."""
    return f"There is no Mac {name!r} in the rack: it has {', '.join(mac.name for mac in status.macs) or 'none'}."


def _homeless(mac: Member, replica: ReplicaReport, status: RackStatus) -> str | None:
    """Why the answers of an engine on the Mac could go on nowhere, if so."""
    if mac.name not in _macs_of([replica]):
        return None
    leaving = {mac.name, *(one.name for one in status.macs if status.state_of(one) == DRAINING)}
    others = [other for other in status.serving if other.replica != replica.replica]
    if any(other.model == replica.model and not leaving & _macs_of([other]) for other in others):
        return None
    free = [
        one.name
        for one in status.macs
        if status.state_of(one) == ALIVE
        and one.name not in leaving | _macs_of(others)
        and one.facts is not None
        and one.facts.version == status.version
    ]
    if len(free) >= replica.least_macs:
        return None
    return (
        f"{mac.name} holds {replica.model}, which no other engine serves and which takes {replica.least_macs} Mac(s) "
        f"where {len(free)} would be free: add a Mac with `pomarium rack join`, or end the endpoint first."
    )


def _without_others(mac: Member, status: RackStatus) -> str | None:
    """An engine that waits for its answers takes no others: why nobody would, if so."""
    for replica in _last_ones(mac, status):
        return (
            f"{mac.name} has a part in the only engine of {replica.model}, which would take no request while it waits: "
            "leave --wait out, and another one is started at once."
        )
    return None


def spared(mac: Member, status: RackStatus) -> tuple[str, ...]:
    """The engines that have nothing on the Mac but their own process, of models that no other engine serves: they can
    go on while others are started."""
    return tuple(one.replica for one in _last_ones(mac, status) if mac.name not in _macs_of([one]))


def _last_ones(mac: Member, status: RackStatus) -> list[ReplicaReport]:
    """The engines with a part on the Mac whose models no engine without one serves."""
    leaving = held(mac, status)
    staying = {one.model for one in status.serving if one.replica not in leaving}
    return [one for one in status.serving if one.replica in leaving and one.model not in staying]


def held(mac: Member, status: RackStatus) -> tuple[str, ...]:
    """The engines that have a stage on the Mac, or their own process, by replica."""
    staged = {report.replica for report in status.serving if mac.name in _macs_of([report])}
    there = {
        actor.replica for actor in status.actors if actor.kind == ENGINE and actor.alive and actor.node == mac.node
    }
    return tuple(sorted(staged | there))


def freed(name: str, status: RackStatus) -> bool:
    """Whether its node has ended as it was told to."""
    return any(mac.name == name and status.state_of(mac) == DRAINED for mac in status.macs)


def _macs_of(replicas: Iterable[ReplicaReport]) -> set[str]:
    return {stage.mac for replica in replicas for stage in replica.stages}
