"""Placement finds what brute force finds, refuses exactly what does not fit, and says exactly what is missing."""

import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pomarium.cluster.placement import lattice
from pomarium.cluster.placement.model import (
    LayerProfile,
    Link,
    Mac,
    ModelProfile,
    Plan,
    Rack,
    Refusal,
    Workload,
    evaluate,
    memory_needed,
)
from pomarium.cluster.placement.place import Objective, place
from pomarium.worker.errors import SettingsError

LATENCY, THROUGHPUT = Objective.LATENCY, Objective.THROUGHPUT
GIB = 1 << 30
Cuts = tuple[tuple[str, int, int], ...]


def all_cuts(rack: Rack, layers: int, stages: int | None) -> Iterator[Cuts]:
    counts = range(1, min(len(rack.macs), layers) + 1) if stages is None else [stages]
    for count in counts:
        for macs in permutations(rack.macs, count):
            for inner in combinations(range(1, layers), count - 1):
                bounds = (0, *inner, layers)
                yield tuple((m.name, a, b) for m, a, b in zip(macs, bounds[:-1], bounds[1:], strict=True))


def shortage(rack: Rack, profile: ModelProfile, workload: Workload, cuts: Cuts) -> int:
    memory = {mac.name: mac.memory for mac in rack.macs}
    return sum(max(0, sum(memory_needed(profile, workload, a, b)) - memory[name]) for name, a, b in cuts)


def value(plan: Plan, objective: Objective) -> float:
    return plan.token_s if objective is LATENCY else plan.round_s


@st.composite
def layers_of(draw: st.DrawFn) -> LayerProfile:
    weight = draw(st.integers(1, 40))
    return LayerProfile(
        weight_bytes=weight,
        flops=draw(st.integers(0, 50)),
        kv_bytes=draw(st.integers(0, 3)),
        expert_bytes=draw(st.integers(0, weight)),
        active_share=draw(st.sampled_from([0.25, 1.0])),
        attention_flops=draw(st.integers(0, 2)),
        window=draw(st.sampled_from([None, None, 2])),
    )


@st.composite
def profiles(draw: st.DrawFn) -> ModelProfile:
    one = draw(layers_of())
    layers = draw(st.lists(st.one_of(st.just(one), layers_of()), min_size=1, max_size=6))
    return ModelProfile(
        "tiny",
        tuple(layers),
        embedding_bytes=draw(st.integers(0, 30)),
        head_bytes=draw(st.integers(0, 30)),
        tied=draw(st.booleans()),
        hidden_bytes=draw(st.integers(1, 8)),
        head_flops=draw(st.integers(0, 50)),
        shared_bytes=draw(st.integers(0, 5)),
    )


@st.composite
def racks(draw: st.DrawFn, fewest: int = 1, most: int = 4, room: int = 120) -> Rack:
    kinds = draw(
        st.lists(st.tuples(st.integers(1, room), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=3)
    )
    count = draw(st.integers(fewest, most))
    macs = tuple(Mac(f"m{i}", *map(int, draw(st.sampled_from(kinds)))) for i in range(count))
    link = st.builds(Link, st.integers(1, 9).map(float), st.integers(0, 20).map(float))
    pairs = [frozenset(pair) for pair in combinations([mac.name for mac in macs], 2)]
    links = draw(st.dictionaries(st.sampled_from(pairs), link, max_size=4)) if pairs else {}
    return Rack(macs, draw(link), links)


workloads = st.builds(
    Workload,
    context=st.integers(1, 9),
    streams=st.integers(1, 5),
    prompt_share=st.sampled_from([0.0, 0.5]),
    chunk=st.just(4),
    block=st.just(2),
    stage_bytes=st.integers(0, 10),
    stage_s=st.sampled_from([0.0, 3.0]),
)
stage_counts = st.one_of(st.none(), st.integers(1, 3))
objectives = st.sampled_from([LATENCY, THROUGHPUT])


@settings(max_examples=120)
@given(racks(), profiles(), workloads, stage_counts, objectives)
def test_agrees_with_brute_force(
    rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None, objective: Objective
) -> None:
    """The optimum over all orders and cuts; refused exactly when nothing fits, with the least missing memory."""
    assume(stages is None or stages <= min(len(rack.macs), len(profile.layers)))
    found = place(rack, profile, workload, stages=stages, objective=objective)
    short = {cuts: shortage(rack, profile, workload, cuts) for cuts in all_cuts(rack, len(profile.layers), stages)}
    fitting = [evaluate(rack, profile, workload, cuts) for cuts, missing in short.items() if not missing]
    if not fitting:
        assert isinstance(found, Refusal)
        assert found.missing == min(short.values()) == sum(size for _, size in found.shortfalls)
        return
    assert isinstance(found, Plan)
    assert shortage(rack, profile, workload, found.cuts()) == 0
    best = min(value(plan, objective) for plan in fitting)
    assert value(found, objective) == pytest.approx(best, rel=1e-8, abs=1e-9)
    if objective is LATENCY:  # among equals the steadiest
        equals = [p for p in fitting if p.token_s <= best * (1 + 1e-9) and len(p.stages) == len(found.stages)]
        alone = replace(workload, streams=1)
        slowest = [evaluate(rack, profile, alone, p.cuts()).stages for p in (found, *equals)]
        mine, *others = [max(max(s.step_s, s.busy_s) for s in stages) for stages in slowest]
        assert mine <= min(others) * (1 + 1e-8)
    fewest = min(len(p.stages) for p in fitting if value(p, objective) <= best * (1 + 1e-9))
    assert len(found.stages) == fewest


@settings(max_examples=60)
@given(racks(room=60), profiles(), workloads, stage_counts)
def test_what_is_missing_is_enough(rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None) -> None:
    """Adding the shortfalls makes it fit, on one Mac or several; leaving one byte out does not."""
    assume(stages is None or stages <= min(len(rack.macs), len(profile.layers)))
    refusal = place(rack, profile, workload, stages=stages)
    assume(isinstance(refusal, Refusal))
    assert isinstance(refusal, Refusal)
    for less in (0, 1):
        more = dict(refusal.shortfalls)
        more[refusal.shortfalls[0][0]] -= less
        macs = tuple(replace(mac, memory=mac.memory + more.get(mac.name, 0)) for mac in rack.macs)
        found = place(replace(rack, macs=macs), profile, workload, stages=stages)
        assert isinstance(found, Refusal) == bool(less)
    for mac, size in refusal.shortfalls:
        assert mac in refusal.reason
        assert size > 0


@settings(max_examples=60)
@given(racks(most=5), profiles(), workloads, objectives)
def test_plans_are_whole(rack: Rack, profile: ModelProfile, workload: Workload, objective: Objective) -> None:
    """Every layer once and in order, no Mac twice, the ends where they belong, nothing over its memory."""
    plan = place(rack, profile, workload, objective=objective)
    assume(isinstance(plan, Plan))
    assert isinstance(plan, Plan)
    assert [i for s in plan.stages for i in range(s.first, s.end)] == list(range(len(profile.layers)))
    assert len({s.mac for s in plan.stages}) == len(plan.stages)
    assert [s.has_embedding for s in plan.stages] == [True] + [False] * (len(plan.stages) - 1)
    assert [s.has_head for s in plan.stages] == [False] * (len(plan.stages) - 1) + [True]
    assert all(s.used <= s.memory and s.end > s.first for s in plan.stages)
    spare = (len(plan.stages) - 1) * profile.shared_bytes
    spare += profile.embedding_bytes if profile.tied and len(plan.stages) > 1 else 0
    assert sum(s.weight_bytes for s in plan.stages) == profile.weight_bytes + spare
    slowest = max(max(s.step_s, s.hop_s) for s in plan.stages)
    assert plan.bottleneck in {s.mac for s in plan.stages if s.step_s == slowest} or "->" in plan.bottleneck


@settings(max_examples=60)
@given(racks(most=4), profiles(), workloads, objectives, st.data())
def test_a_further_mac_never_worsens(
    rack: Rack, profile: ModelProfile, workload: Workload, objective: Objective, data: st.DataObject
) -> None:
    before = place(rack, profile, workload, objective=objective)
    new = Mac("new", data.draw(st.integers(1, 120)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    after = place(replace(rack, macs=(*rack.macs, new)), profile, workload, objective=objective)
    if isinstance(before, Plan):
        assert isinstance(after, Plan)
        assert value(after, objective) <= value(before, objective) * (1 + 1e-8)
    elif isinstance(after, Refusal):
        assert after.missing <= before.missing


@settings(max_examples=50)
@given(racks(), profiles(), workloads, objectives, st.sampled_from([2, 1024]))
def test_only_ratios_matter(
    rack: Rack, profile: ModelProfile, workload: Workload, objective: Objective, factor: int
) -> None:
    """All bytes times a power of two, memory and bandwidths with them: the same times."""
    more = {"weight_bytes": factor, "kv_bytes": factor, "expert_bytes": factor}
    layers = tuple(replace(a, **{k: getattr(a, k) * f for k, f in more.items()}) for a in profile.layers)
    sizes = ("embedding_bytes", "head_bytes", "shared_bytes", "hidden_bytes")
    large = replace(profile, layers=layers, **{k: getattr(profile, k) * factor for k in sizes})
    macs = tuple(replace(m, memory=m.memory * factor, bandwidth=m.bandwidth * factor) for m in rack.macs)

    def faster(link: Link) -> Link:
        return replace(link, bandwidth=link.bandwidth * factor)

    wide = Rack(macs, faster(rack.default_link), {pair: faster(link) for pair, link in rack.links.items()})
    heavy = replace(workload, stage_bytes=workload.stage_bytes * factor)
    one, other = place(rack, profile, workload, objective=objective), place(wide, large, heavy, objective=objective)
    if isinstance(one, Refusal):
        assert isinstance(other, Refusal)
        assert other.missing == factor * one.missing
    else:
        assert isinstance(other, Plan)
        assert value(other, objective) == value(one, objective)
        assert len(other.stages) == len(one.stages)


@settings(max_examples=80)
@given(racks(), profiles(), workloads, stage_counts, objectives)
def test_one_order_of_macs_is_searched_exactly(
    rack: Rack, profile: ModelProfile, workload: Workload, stages: int | None, objective: Objective
) -> None:
    """Where there are too many Macs for all orders: the best cut of the one order, Macs left out or not."""
    assume(stages is None or stages <= min(len(rack.macs), len(profile.layers)))
    rack = Rack(rack.macs, rack.default_link)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice, "MOST_ROWS", 0)
        found = place(rack, profile, workload, stages=stages, objective=objective)
    rank = {m.name: i for i, m in enumerate(sorted(rack.macs, key=lambda m: (-m.memory, -m.bandwidth, m.name)))}
    fitting = [
        evaluate(rack, profile, workload, cuts)
        for cuts in all_cuts(rack, len(profile.layers), stages)
        if not shortage(rack, profile, workload, cuts) and all(rank[a[0]] < rank[b[0]] for a, b in pairwise(cuts))
    ]
    assert isinstance(found, Plan) == bool(fitting)
    if isinstance(found, Plan):
        assert value(found, objective) == pytest.approx(min(value(p, objective) for p in fitting), rel=1e-8, abs=1e-9)


def llama(layers: int = 80, layer_bytes: int = GIB // 2, tied: bool = False) -> ModelProfile:
    layer = LayerProfile(layer_bytes, flops=1.7e9, kv_bytes=4096, attention_flops=32768.0)
    return ModelProfile("llama", (layer,) * layers, GIB, 0 if tied else GIB, tied, 16384, 2.1e9)


ETHERNET = Link(1.25e9, 0.0002)
CHAT = Workload(8192, streams=4)


def unlike(count: int, gibibytes: int = 16, seed: int = 0) -> tuple[Mac, ...]:
    draw = np.random.default_rng(seed)
    return tuple(
        Mac(
            f"mac{i}",
            int(gibibytes * GIB * draw.uniform(0.5, 1.5)),
            draw.uniform(1, 8) * 1e11,
            draw.uniform(2, 27) * 1e12,
        )
        for i in range(count)
    )


def test_unequal_macs_get_unequal_slices() -> None:
    macs = (Mac("slow", 90 * GIB, 2e11, 5e12), Mac("fast", 90 * GIB, 8e11, 2e13))
    plan = place(Rack(macs, ETHERNET), llama(layer_bytes=GIB), CHAT, stages=2, objective=THROUGHPUT)
    assert isinstance(plan, Plan)
    layers = {s.mac: s.end - s.first for s in plan.stages}
    assert layers["fast"] == pytest.approx(64, abs=2)
    assert layers["slow"] + layers["fast"] == 80
    times = [s.step_s for s in plan.stages]
    assert max(times) < 1.1 * min(times)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_any_number_of_macs_shares_evenly(count: int) -> None:
    """Equal Macs, a model with ends of no weight: the slices differ by a layer at most."""
    rack = Rack(tuple(Mac(f"m{i}", 90 * GIB, 8e11, 2e13) for i in range(count)), ETHERNET)
    profile = replace(llama(61), embedding_bytes=0, head_bytes=0, head_flops=0.0)
    plan = place(rack, profile, replace(CHAT, streams=16), stages=count, objective=THROUGHPUT)
    assert isinstance(plan, Plan)
    sizes = [s.end - s.first for s in plan.stages]
    assert max(sizes) == -(-61 // count)


def test_a_tied_embedding_counts_at_both_ends() -> None:
    rack = Rack((Mac("a", 22 * GIB, 4e11, 1e13), Mac("b", 22 * GIB, 4e11, 1e13)), ETHERNET)
    tied, untied = replace(llama(80, tied=True)), llama(80)
    small = Workload(512, stage_bytes=0)
    assert isinstance(place(rack, tied, small), Plan)
    one, two = (place(rack, p, small, stages=2) for p in (tied, untied))
    assert isinstance(one, Plan)
    assert isinstance(two, Plan)
    assert sum(s.weight_bytes for s in one.stages) == sum(s.weight_bytes for s in two.stages)
    assert tied.weight_bytes == untied.weight_bytes - GIB


def test_latency_takes_few_macs_and_throughput_many() -> None:
    rack = Rack(tuple(Mac(f"m{i}", 96 * GIB, 8e11, 2e13) for i in range(4)), ETHERNET)
    busy = replace(CHAT, streams=16)
    alone, together = (place(rack, llama(), busy, objective=objective) for objective in (LATENCY, THROUGHPUT))
    assert isinstance(alone, Plan)
    assert isinstance(together, Plan)
    assert len(alone.stages) == 1
    assert len(together.stages) == 4
    assert together.tokens_per_s > 1.5 * alone.tokens_per_s


def test_latency_leaves_a_slow_mac_out() -> None:
    """It fits on the large slow one alone, but two fast ones answer sooner."""
    macs = (Mac("slow", 96 * GIB, 1e11, 4e12), Mac("f1", 32 * GIB, 8e11, 2e13), Mac("f2", 32 * GIB, 8e11, 2e13))
    plan = place(Rack(macs, ETHERNET), llama(), CHAT)
    assert isinstance(plan, Plan)
    assert {s.mac for s in plan.stages} == {"f1", "f2"}


def test_stages_follow_the_fast_links() -> None:
    """A chain of cables: neighbours in the plan are neighbours on the wire."""
    macs = tuple(Mac(name, 16 * GIB, 4e11, 1e13) for name in "bdac")
    cable = Link(5e9, 0.0001)
    links = {frozenset(pair): cable for pair in ("ab", "bc", "cd")}
    plan = place(Rack(macs, Link(1e8, 0.005), links), llama(), Workload(4096), stages=4)
    assert isinstance(plan, Plan)
    assert "".join(s.mac for s in plan.stages) in ("abcd", "dcba")


def test_experts_cost_memory_but_little_time() -> None:
    dense = LayerProfile(100, flops=1.0, kv_bytes=0)
    sparse = replace(dense, expert_bytes=80, active_share=0.125)
    assert sparse.bytes_read(1) == pytest.approx(30)
    assert sparse.bytes_read(8) == pytest.approx(20 + 80 * (1 - 0.875**8))
    assert dense.bytes_read(8) == 100


def test_a_window_bounds_the_cache() -> None:
    workload = Workload(100_000, streams=2, chunk=512)
    full = LayerProfile(0, flops=0, kv_bytes=10)
    assert workload.kv_bytes(full) == 10 * (2 * 100_000 + 16)
    assert workload.kv_bytes(replace(full, window=1024)) == 10 * 16 * (2 * 65 + 32 + 1)
    assert Workload(64).kv_bytes(replace(full, window=1024)) == Workload(64).kv_bytes(full)


def test_too_few_macs_and_senseless_stages() -> None:
    rack = Rack((Mac("a", 900 * GIB, 4e11, 1e13),), ETHERNET)
    refusal = place(rack, llama(), CHAT, stages=2)
    assert isinstance(refusal, Refusal)
    assert (refusal.missing, refusal.reason) == (0, "2 stages need 2 Macs and there are 1.")
    assert isinstance(place(Rack((), ETHERNET), llama(), CHAT), Refusal)
    for stages in (0, 81):
        with pytest.raises(SettingsError, match="80 layers"):
            place(rack, llama(), CHAT, stages=stages)


@pytest.mark.parametrize("objective", [LATENCY, THROUGHPUT])
@pytest.mark.parametrize("equal", [True, False])
def test_eight_unlike_macs_and_eighty_layers_take_under_a_second(objective: Objective, equal: bool) -> None:
    macs = unlike(8)
    pairs = {frozenset((a.name, b.name)) for a, b in combinations(macs, 2)} if not equal else set()
    links = {pair: Link(1e9 * (i + 1), 1e-4 * (i + 1)) for i, pair in enumerate(sorted(pairs, key=sorted))}
    seconds = []
    for _ in range(3):  # the best of three: other processes share the caches
        began = time.process_time()
        plan = place(Rack(macs, ETHERNET, links), llama(), Workload(8192, streams=16), objective=objective)
        seconds.append(time.process_time() - began)
        assert isinstance(plan, Plan)
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


@pytest.mark.parametrize("count", [50])
def test_a_large_rack_of_unlike_macs_is_planned_in_bounded_time(count: int) -> None:
    macs = unlike(count, 8)
    links = {frozenset((a.name, b.name)): Link(1e10, 5e-5) for a, b in pairwise(macs)}
    began = time.process_time()
    plan = place(Rack(macs, ETHERNET, links), llama(), CHAT)
    assert isinstance(plan, Plan)
    assert time.process_time() - began < 5
    refusal = place(Rack(macs, ETHERNET, links), llama(layer_bytes=6 * GIB), CHAT)
    assert isinstance(refusal, Refusal)
    assert time.process_time() - began < 10


def test_many_macs_of_few_kinds_are_planned_exactly() -> None:
    """Fifty Macs of two kinds: the best single-stream plan is on fast ones only, found among all orders."""
    macs = tuple(Mac(f"s{i}", 8 * GIB, 1e11, 3e12) for i in range(40))
    macs += tuple(Mac(f"f{i}", 24 * GIB, 8e11, 2e13) for i in range(10))
    plan = place(Rack(macs, ETHERNET), llama(), CHAT)
    assert isinstance(plan, Plan)
    assert all(s.mac.startswith("f") for s in plan.stages)
    assert len(plan.stages) == 3
