"""Which stage runs on which node: placement over what a survey found. Pure.

    RackNodes, or the bundles of a given placement group --slots--> Slots
    Slots, Profile, Ask --stage--> Staging, or the Refusal

One stage is one slot. Without leave to share, each Mac lends one slot to a replica.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pomarium.cluster.executor.survey import RackNode
from pomarium.cluster.placement.model import Mac, Network, Plan, Rack, Refusal, Workload
from pomarium.cluster.placement.place import Objective, place
from pomarium.cluster.placement.profile import Profile, Profiles
from pomarium.cluster.rack.drains import Drain

UNSAID_CONTEXT = 2048


@dataclass(frozen=True)
class Ask:
    """What a replica wants of the rack.

    Attributes:
        source: the model, as worker.models.resolve takes it.
        profiles: its costs; None: they are read when they are needed.
        stages: exactly so many; None takes what placement finds best.
        max_model_len: tokens that one sequence's KV cache must hold; None is the model's longest.
        rows, sampled: tokens computed, and sampled, in one step at most.
        share_macs: stages of the replica may share a Mac.
        streams: requests that the KV cache must hold at once, each of max_model_len; None: one is enough.
        network: between the Macs.
    """

    source: str
    profiles: Profiles | None = None
    stages: int | None = 1
    max_model_len: int | None = None
    rows: int = 2048
    sampled: int = 256
    share_macs: bool = False
    streams: int | None = None
    network: Network = field(default_factory=Network)


@dataclass(frozen=True)
class Slot:
    """Room for one worker. `mac` has a name of its own and its share of the machine's memory."""

    node: RackNode
    mac: Mac
    bundle: int | None = None


@dataclass(frozen=True)
class Staging:
    """Slots in rank order, and the half-open range of layers of each; None for the whole model on one slot."""

    slots: tuple[Slot, ...]
    cuts: tuple[tuple[int, int] | None, ...]


def of_version(nodes: Sequence[RackNode], version: str) -> tuple[tuple[RackNode, ...], str]:
    """The nodes that an engine of `version` can drive, and a sentence about the others, empty if there are none."""
    fitting = tuple(node for node in nodes if node.version in (None, version))
    others = [f"{node.mac.name} runs {node.version}" for node in nodes if node not in fitting]
    if not others:
        return fitting, ""
    return fitting, f"Left out: {', '.join(others)} where {version} is needed; install the same version there."


def without_drained(nodes: Sequence[RackNode], drains: Sequence[Drain]) -> tuple[tuple[RackNode, ...], str]:
    """The nodes that nobody drains, and a sentence about the others, empty if there are none."""
    leaving = {drain.node for drain in drains}
    names = [node.mac.name for node in nodes if node.id in leaving]
    said = f"Left out: {', '.join(names)}, which {'is' if len(names) == 1 else 'are'} being drained." if names else ""
    return tuple(node for node in nodes if node.id not in leaving), said


def slots(nodes: Sequence[RackNode], share_macs: bool) -> tuple[Slot, ...]:
    """Free slots: one of each Mac, or with leave to share all of them."""
    found = []
    for node in nodes:
        names = [node.mac.name, *(f"{node.mac.name}#{place}" for place in range(2, node.free + 1))]
        for name in names[: node.free if share_macs else min(1, node.free)]:
            found.append(Slot(node, _share(node, name)))
    return tuple(found)


def bundle_slots(nodes: Sequence[RackNode], bundles: Sequence[tuple[int, str]]) -> tuple[Slot, ...]:
    """The slots of a given placement group: (index, node id) of each bundle that offers the resource."""
    by_id = {node.id: node for node in nodes}
    return tuple(
        Slot(by_id[node_id], _share(by_id[node_id], f"{by_id[node_id].mac.name}#{index}"), index)
        for index, node_id in bundles
        if node_id in by_id
    )


def _share(node: RackNode, name: str) -> Mac:
    return replace(node.mac, name=name, memory=node.mac.memory // node.workers)


def stage(found: Sequence[Slot], profile: Profile, ask: Ask) -> Staging | Refusal:
    """The best stages on these slots.

    Where `streams` are given, this is what `pomarium plan` computes. Else one sequence of maximum length has to fit.
    How many stages: as asked, or those with the shortest time per token for one stream. Which layers on which: the most
    tokens per second with one stream for each stage, which together are as long as that sequence, for that is what
    keeps all stages busy.

    Raises:
        SettingsError: more stages are asked for than the model has layers.
    """
    rack = Rack(tuple(slot.mac for slot in found), ask.network.default, ask.network.pairs)
    workload = Workload(
        context=ask.max_model_len or profile.longest_context or UNSAID_CONTEXT,
        streams=ask.streams or 1,
        chunk=ask.rows,
        stage_bytes=profile.stage_bytes(rows=ask.rows, sampled=min(ask.sampled, ask.rows)),
    )
    plan = place(rack, profile.model, workload, stages=ask.stages)
    if ask.streams is None and isinstance(plan, Plan) and (count := len(plan.stages)) > 1:
        shared = replace(workload, context=max(1, workload.context // count), streams=count)
        balanced = place(rack, profile.model, shared, stages=count, objective=Objective.THROUGHPUT)
        plan = balanced if isinstance(balanced, Plan) else plan
    if isinstance(plan, Refusal):
        return plan
    by_name = {slot.mac.name: slot for slot in found}
    cuts = tuple((s.first, s.end) for s in plan.stages) if len(plan.stages) > 1 else (None,)
    return Staging(tuple(by_name[s.mac] for s in plan.stages), cuts)
