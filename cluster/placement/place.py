"""Which layers of a model go on which Mac: pure functions over the facts and figures of model.py.

    Rack + ModelProfile + Workload --place--> Plan, or Refusal: how much memory is missing, and where

Every stage holds at least one layer; the embedding lies on the first, norm and head on the last (and the embedding
again if it is tied). Unequal Macs get unequal slices, because a cut is judged by its times and not by its layers.

Number of stages, unless it is given: that with the best figure of the objective, the fewest among equals. LATENCY
minimises `Plan.token_s` and, among equals, the slowest stage: each further Mac costs a hop and a step's constant there,
so it comes to the fewest stages that fit, unless faster Macs outweigh that. THROUGHPUT minimises `Plan.round_s`, so it
takes whatever Mac makes this one replica faster; who wants several replicas gives each its own Macs.

The search (search.py) is exact over all orders and cuts as long as the Macs are few or alike: Macs of one
size and speed, with the same links, count as one kind. That covers 12 unlike Macs over equal links, 8 over unequal
ones, and any number of a few kinds. Beyond, stages follow one order (memory, then bandwidth, descending; Macs may be
left out), the token ids' way back counts as that over the quickest link, and `auto` tries MAX_AUTO_STAGES stages at
most unless only more fit. Whether the model fits at all, and what is missing, is exact for up to 12 sizes of memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from pomarium.cluster.placement.lattice import Lattice, equal_between, exact_lattice, ordered_lattice
from pomarium.cluster.placement.model import (
    Mac,
    ModelProfile,
    Plan,
    Rack,
    Refusal,
    Workload,
    evaluate,
    head_seconds,
    layer_seconds,
    link_busy_seconds,
)
from pomarium.cluster.placement.search import Found, Problem, Slice, fastest, fastest_round, least_shortage, steadiest
from pomarium.worker.errors import SettingsError

MAX_AUTO_STAGES = 16
Cuts = list[tuple[str, int, int]]
Kinds = Sequence[Sequence[Mac]]

_ROUNDING = 1e-9
"""Figures that differ by this share are equal."""


class Objective(StrEnum):
    """What a plan is to be good at."""

    LATENCY = "latency"
    """One stream's time per token."""
    THROUGHPUT = "throughput"
    """Tokens per second of all the workload's streams."""


def place(
    rack: Rack,
    profile: ModelProfile,
    workload: Workload,
    *,
    stages: int | None = None,
    objective: Objective | None = None,
) -> Plan | Refusal:
    """The best plan that fits into the Macs' memory; see the module for "best".

    Args:
        stages: exactly so many, each on a Mac of its own; None is `auto`.
        objective: None is LATENCY, but THROUGHPUT where several streams share a given number of stages.

    Raises:
        SettingsError: `stages` is not between 1 and the number of layers.
    """
    if stages is not None and not 1 <= stages <= len(profile.layers):
        raise SettingsError(f"{profile.name} has {len(profile.layers)} layers, so it cannot run in {stages} stages.")
    if not rack.macs:
        return Refusal(f"There is no Mac to run {profile.name} on.")
    if stages is not None and stages > len(rack.macs):
        return Refusal(f"{stages} stages need {stages} Macs and there are {len(rack.macs)}.")
    fewest, most = (1, min(len(rack.macs), len(profile.layers))) if stages is None else (stages, stages)
    exact, ordered = _exact(rack, profile, workload, most), _ordered(rack, profile, workload, most)
    if exact is None and stages is None:
        most = min(most, MAX_AUTO_STAGES)
    if objective is None:
        objective = Objective.LATENCY if stages is None or workload.streams == 1 else Objective.THROUGHPUT
    if objective is Objective.LATENCY:
        cuts = _least_token(exact or ordered, fewest, most)
    else:
        cuts = _least_round(ordered, fewest, min(most, MAX_AUTO_STAGES) if stages is None else most, np.inf)
        if exact is not None:  # the ordered search is quick, and its plan spares the exact one most of the way
            known = np.inf if cuts is None else evaluate(rack, profile, workload, cuts).round_s
            cuts = _least_round(exact, fewest, most, known * (1 + _ROUNDING)) or cuts
    return _shortage(rack, profile, workload, stages) if cuts is None else evaluate(rack, profile, workload, cuts)


@dataclass(frozen=True)
class _Search:
    """What is searched: for a model and workload, kinds of Macs in the orders of a lattice over the kinds."""

    rack: Rack
    profile: ModelProfile
    workload: Workload
    kinds: Kinds
    lattice: Lattice

    def problem(self, batch: int) -> Problem:
        return _problem(self.rack, self.profile, self.workload, self.kinds, batch)


def _least_token(search: _Search, fewest: int, most: int) -> Cuts | None:
    problem = search.problem(batch=1)
    way = fastest(problem, search.lattice, most)
    best, value = 0, np.inf
    for stages in range(fewest, most + 1):
        if way.value(stages) < value * (1 - _ROUNDING):
            best, value = stages, way.value(stages)
    if not best:
        return None
    return _cuts(steadiest(problem, search.lattice, best, value * (1 + _ROUNDING)), search.kinds)


def _least_round(search: _Search, fewest: int, most: int, below: float) -> Cuts | None:
    best, problem, batch = None, None, 0
    for stages in range(most, fewest - 1, -1):  # the most are often the best, and then the others are soon dismissed
        if problem is None or search.workload.batch(stages) != batch:
            batch = search.workload.batch(stages)
            problem = search.problem(batch)
        found = fastest_round(problem, search.lattice, stages, search.workload.cohorts(stages), below)
        if found is not None:
            best, below = found, found.value * (1 + _ROUNDING)
    return None if best is None else _cuts(best.slices, search.kinds)


def _exact(rack: Rack, profile: ModelProfile, workload: Workload, depth: int) -> _Search | None:
    """All orders of the Macs by kind; None if there are too many."""
    groups: list[list[Mac]] = []
    for mac in rack.macs:
        for group in groups:
            if _alike(rack, mac, group[0]):
                group.append(mac)
                break
        else:
            groups.append([mac])
    kinds = tuple(map(tuple, groups))
    equal_hops, equal_back = _equal_links(rack, kinds)
    lattice = exact_lattice(tuple(map(len, kinds)), depth, equal_hops=equal_hops, equal_back=equal_back)
    return None if lattice is None else _Search(rack, profile, workload, kinds, lattice)


def _ordered(rack: Rack, profile: ModelProfile, workload: Workload, depth: int) -> _Search:
    """One order of all Macs."""
    ordered = sorted(rack.macs, key=lambda m: (-m.memory, -m.bandwidth, m.name))
    kinds = tuple((mac,) for mac in ordered)
    lattice = ordered_lattice(len(kinds), depth, equal_hops=_equal_links(rack, kinds)[0])
    return _Search(rack, profile, workload, kinds, lattice)


def _alike(rack: Rack, one: Mac, other: Mac) -> bool:
    if (one.memory, one.bandwidth, one.flops) != (other.memory, other.bandwidth, other.flops):
        return False
    third = (m.name for m in rack.macs if m.name not in (one.name, other.name))
    return all(rack.link(one.name, name) == rack.link(other.name, name) for name in third)


def _equal_links(rack: Rack, kinds: Kinds) -> tuple[bool, bool]:
    """Whether a hop, and whether the way back, costs the same between any two Macs."""
    counts = tuple(map(len, kinds))
    latency = _between(rack, kinds, lambda a, b: rack.link(a, b).latency, 0.0)
    bandwidth = _between(rack, kinds, lambda a, b: rack.link(a, b).bandwidth, 0.0)
    equal_back = equal_between(latency, counts)
    return equal_back and equal_between(bandwidth, counts), equal_back


def _between(
    rack: Rack, kinds: Kinds, value: Callable[[str, str], float], alone: float
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(K, K): `value` between Macs of two kinds; `alone` where a kind has no second Mac."""
    table = np.full((len(kinds), len(kinds)), alone)
    for i, one in enumerate(kinds):
        for j, other in enumerate(kinds):
            if i != j or len(one) > 1:
                table[i, j] = value(one[0].name, other[-1].name)
    return table


def _problem(rack: Rack, profile: ModelProfile, workload: Workload, kinds: Kinds, batch: int) -> Problem:
    macs = [kind[0] for kind in kinds]
    needs = [layer.weight_bytes + workload.kv_bytes(layer) for layer in profile.layers]
    seconds = [[layer_seconds(layer, mac, workload, batch) for layer in profile.layers] for mac in macs]
    latency = _between(rack, kinds, lambda a, b: rack.link(a, b).latency, np.inf)
    busy = _between(rack, kinds, lambda a, b: link_busy_seconds(profile, rack.link(a, b), workload, batch), 0.0)
    return Problem(
        memory=np.array([mac.memory for mac in macs], np.int64),
        need=np.concatenate([[0], np.cumsum(np.array(needs, np.int64))]),
        stage_bytes=workload.stage_bytes + profile.shared_bytes,
        first_bytes=profile.embedding_bytes,
        last_bytes=profile.last_bytes,
        single_bytes=profile.embedding_bytes + profile.head_bytes,
        layer_s=np.concatenate([np.zeros((len(macs), 1)), np.cumsum(np.array(seconds), axis=1)], axis=1),
        stage_s=workload.stage_s,
        head_s=np.array([head_seconds(profile, mac, batch) for mac in macs]),
        hop_s=latency + busy,
        busy_s=busy,
        back_s=latency,
    )


def _cuts(slices: Sequence[Slice], kinds: Kinds) -> Cuts:
    """Slices with a Mac of each kind, in turn."""
    left = [iter(kind) for kind in kinds]
    return [(next(left[kind]).name, first, end) for kind, first, end in slices]


def longest_context(rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None = None) -> int:
    """The most tokens, in whole blocks, that each stream's cache can have with everything else as in `workload`; or 0.

    Looks below `workload.context`, which does not fit.
    """
    fitting, refused = 0, -(-workload.context // workload.block)
    while refused - fitting > 1:
        blocks = (fitting + refused) // 2
        if _shortest(rack, profile, replace(workload, context=blocks * workload.block), stages)[1].value > 0:
            refused = blocks
        else:
            fitting = blocks
    return fitting * workload.block


def _shortest(rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None) -> tuple[Kinds, Found]:
    """The cut that lacks the fewest bytes; 0 if the model fits."""
    by_memory: dict[int, list[Mac]] = {}
    for mac in sorted(rack.macs, key=lambda m: -m.memory):
        by_memory.setdefault(mac.memory, []).append(mac)
    kinds: Kinds = tuple(map(tuple, by_memory.values()))
    most = min(len(rack.macs), len(profile.layers)) if stages is None else stages
    lattice = exact_lattice(tuple(map(len, kinds)), most, equal_hops=True, equal_back=True)
    if lattice is None:
        kinds = tuple((mac,) for kind in kinds for mac in kind)
        lattice = ordered_lattice(len(kinds), most, equal_hops=True)
    return kinds, least_shortage(_problem(rack, profile, workload, kinds, 1), lattice, stages or 1, most)


def _shortage(rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None) -> Plan | Refusal:
    """The refusal. A plan only where the search was not over all orders and this one, by memory alone, finds one."""
    kinds, found = _shortest(rack, profile, workload, stages)
    plan = evaluate(rack, profile, workload, _cuts(found.slices, kinds))
    short = tuple((s.mac, s.used - s.memory) for s in plan.stages if s.used > s.memory)
    return Refusal(_sentence(plan, profile, workload, short), int(found.value), short) if short else plan


def _sentence(plan: Plan, profile: ModelProfile, workload: Workload, short: tuple[tuple[str, int], ...]) -> str:
    need, have = sum(s.used for s in plan.stages), sum(s.memory for s in plan.stages)
    where = ", ".join(f"{_gib(size)} on {mac}" for mac, size in short)
    tokens = f"{workload.streams} x {workload.context}" if workload.streams > 1 else f"{workload.context}"
    macs = "1 Mac that offers" if len(plan.stages) == 1 else f"{len(plan.stages)} Macs that offer"
    return (
        f"{profile.name} with KV cache for {tokens} tokens needs {_gib(need)} on {macs} {_gib(have)}: {where} are "
        "missing; add memory or a Mac, lower the context or the number of requests at once, or take a more strongly "
        "quantised model."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 // 10 else f"{size / 2**20:.2f} MiB"
