"""The KV budget: limits that hold for any machine, the rules of the settings, and the facts of this machine."""

import mmap
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pomarium.worker import device, memory
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.errors import InsufficientMemoryError
from pomarium.worker.memory import (
    GIB,
    MemoryFacts,
    MemorySnapshot,
    cache_bytes,
    kv_bytes,
    maximum_kv_bytes,
    minimum_kv_bytes,
    others_since,
    reserve_of,
    share,
    spare,
)
from pomarium.worker.settings import DeviceKind, Settings

MIB = 1 << 20
MACHINE = MemoryFacts(
    kind=DeviceKind.GPU,
    base=48 * GIB,
    available=45 * GIB,
    reserve=3 * GIB,
    others=0,
    weights=8 * GIB,
    activations=GIB,
    workers=1,
    fraction=None,
    paged=True,
    sequence=GIB,
    sequences=256,
    block=MIB,
)

sizes = st.integers(min_value=4 * GIB, max_value=256 * GIB)
facts = st.builds(
    MemoryFacts,
    kind=st.sampled_from(DeviceKind),
    base=sizes,
    available=sizes,
    reserve=st.integers(min_value=0, max_value=4 * GIB),
    others=st.integers(min_value=0, max_value=2 * GIB),
    weights=st.integers(min_value=0, max_value=16 * GIB),
    activations=st.integers(min_value=0, max_value=GIB),
    workers=st.integers(min_value=1, max_value=4),
    fraction=st.none() | st.floats(min_value=0.05, max_value=1.0),
    paged=st.booleans(),
    sequence=st.integers(min_value=1, max_value=2 * GIB),
    sequences=st.integers(min_value=1, max_value=512),
    block=st.integers(min_value=1, max_value=16 * MIB),
    mixed=st.booleans(),
    stage=st.booleans(),
)


def kv_or_none(given_facts: MemoryFacts) -> int | None:
    try:
        return kv_bytes(given_facts)
    except InsufficientMemoryError:
        return None


@given(facts)
def test_the_whole_worker_stays_within_its_share(some: MemoryFacts) -> None:
    kv = kv_or_none(some)
    assume(kv is not None)
    assert kv + some.weights + some.activations + some.others <= some.base // some.workers
    assert kv + some.weights + some.activations <= share(some)


@given(facts)
def test_the_kv_cache_is_whole_blocks_and_holds_one_longest_sequence(some: MemoryFacts) -> None:
    kv = kv_or_none(some)
    assume(kv is not None)
    assert kv % some.block == 0
    assert kv - some.block >= some.sequence, "one block is vLLM's placeholder"
    if not some.paged:
        assert kv == minimum_kv_bytes(some)
        assert kv < some.sequence + 2 * some.block


@given(facts)
def test_the_shares_of_a_machines_workers_sum_to_at_most_the_fraction(some: MemoryFacts) -> None:
    fraction = 1.0 if not some.paged else 0.9 if some.fraction is None else some.fraction
    assert share(some) * some.workers <= some.base * fraction


@given(facts)
def test_a_cpu_worker_stays_under_auto_within_4_gib(some: MemoryFacts) -> None:
    kv = kv_or_none(replace(some, kind=DeviceKind.CPU, paged=True, fraction=None))
    assume(kv is not None)
    assert kv * some.workers <= 4 * GIB


@given(facts)
def test_all_workers_together_leave_the_reserve_free(some: MemoryFacts) -> None:
    """Their weights are there already when pools are made."""
    kv = kv_or_none(some)
    assume(kv is not None)
    assert some.workers * (kv + some.activations) <= some.available - some.reserve


@given(facts)
def test_no_pool_is_larger_than_its_sequences_can_use(some: MemoryFacts) -> None:
    """Every sequence at its longest, in blocks of its own, and the placeholder: not one block more. Twice as many where
    vLLM may have to pad groups of unlike layers."""
    kv = kv_or_none(some)
    assume(kv is not None)
    blocks = some.sequences * -(-some.sequence // some.block)
    assert kv <= maximum_kv_bytes(some) == (blocks * (2 if some.mixed else 1) + 1) * some.block


@given(facts)
def test_a_pool_below_its_sequences_need_is_all_that_one_of_the_bounds_leaves(some: MemoryFacts) -> None:
    """No bound but those that are stated: one block more would break one of them."""
    some = replace(some, paged=True, weights=some.weights // 16, sequence=some.sequence // 16 + 1, sequences=1 << 40)
    kv = kv_or_none(some)
    assume(kv is not None)
    more = kv + some.block + some.activations
    automatic_cpu = some.kind is DeviceKind.CPU and some.fraction is None
    assert (
        more + some.weights > share(some)
        or more > spare(some)
        or (automatic_cpu and (kv + some.block) * some.workers > 2 * GIB)
    )


@given(
    facts,
    st.sampled_from(["base", "available", "sequences"])
    | st.sampled_from(["others", "weights", "activations", "workers", "reserve"]),
    st.integers(min_value=1, max_value=16 * GIB),
)
def test_more_memory_never_gives_less_and_more_use_never_gives_more(some: MemoryFacts, name: str, step: int) -> None:
    step = 1 if name in ("workers", "sequences") else step
    before = kv_or_none(some)
    after = kv_or_none(replace(some, **{name: getattr(some, name) + step}))
    less, more = (before, after) if name in ("base", "available", "sequences") else (after, before)
    assert (less or 0) <= (more or 0)


@given(facts, st.tuples(st.floats(min_value=0.05, max_value=1.0), st.floats(min_value=0.05, max_value=1.0)))
def test_a_higher_fraction_never_gives_less(some: MemoryFacts, fractions: tuple[float, float]) -> None:
    less, more = (kv_or_none(replace(some, fraction=fraction)) for fraction in sorted(fractions))
    assert (less or 0) <= (more or 0)


@given(facts)
def test_a_refusal_says_what_is_missing_and_that_much_more_is_enough(some: MemoryFacts) -> None:
    some = replace(some, weights=some.weights + some.base)
    with pytest.raises(InsufficientMemoryError, match=r"are missing; (lower --max-model-len|serve a smaller)"):
        kv_bytes(some)
    enough = minimum_kv_bytes(some) + some.weights + some.activations + some.others
    plenty = replace(
        some,
        kind=DeviceKind.GPU,
        base=enough * some.workers,
        available=enough * some.workers + some.reserve,
        fraction=1.0,
    )
    assert kv_bytes(plenty) == minimum_kv_bytes(some)


@given(facts)
def test_a_refusal_for_want_of_available_memory_says_so_and_that_much_more_is_enough(some: MemoryFacts) -> None:
    some = replace(
        some, kind=DeviceKind.GPU, available=some.reserve + some.activations * some.workers, others=0, base=1024 * GIB
    )
    with pytest.raises(
        InsufficientMemoryError, match=r"end other programs \(.* are available, of which .* stay free\)"
    ):
        kv_bytes(some)
    enough = replace(some, available=some.available + minimum_kv_bytes(some) * some.workers)
    assert kv_bytes(enough) == minimum_kv_bytes(some)


def test_paged_auto_is_nine_tenths_of_the_base() -> None:
    assert kv_bytes(MACHINE) == pytest.approx(0.9 * 48 * GIB - 9 * GIB, abs=MIB)
    assert kv_bytes(replace(MACHINE, fraction=0.5)) == 15 * GIB


SMOLLM2 = MemoryFacts(
    kind=DeviceKind.GPU,
    base=int(5.33 * GIB),
    available=int(2.6 * GIB),
    reserve=reserve_of(8 * GIB),
    others=0,
    weights=257 * MIB,
    activations=486 * MIB,
    workers=1,
    fraction=None,
    paged=True,
    sequence=8192 * 30 * 2 * 3 * 64 * 2,
    sequences=256,
    block=16 * 30 * 2 * 3 * 64 * 2,
)
"""SmolLM2-135M in bfloat16, 256 sequences of 8,192 tokens, on a Mac of 8 GB with 2.6 GiB available."""


def test_a_small_mac_in_use_keeps_its_reserve() -> None:
    """Before the bound by what is available the pool took 4.08 GiB of the 2.6."""
    assert reserve_of(8 * GIB) == 0.75 * GIB
    assert kv_bytes(SMOLLM2) == pytest.approx((2.6 - 0.75) * GIB - 486 * MIB, abs=MIB)
    assert kv_bytes(replace(SMOLLM2, available=6 * GIB)) == pytest.approx(0.9 * 5.33 * GIB - 743 * MIB, abs=MIB)


def test_a_large_mac_gives_what_the_sequences_can_use() -> None:
    """Before that bound the pool of a Mac of 48 GB took 31.7 GiB for whatever model."""
    large = replace(SMOLLM2, base=36 * GIB, available=44 * GIB, reserve=reserve_of(48 * GIB))
    assert kv_bytes(large) == pytest.approx(0.9 * 36 * GIB - 743 * MIB, abs=MIB)
    assert kv_bytes(replace(large, sequences=8)) == 8 * large.sequence + large.block
    assert kv_bytes(replace(large, sequences=1)) == minimum_kv_bytes(large)


def test_what_was_asked_for_is_given_if_one_sequence_fits() -> None:
    assert cache_bytes(MACHINE, None) == kv_bytes(MACHINE)
    assert cache_bytes(MACHINE, 5 * GIB) == 5 * GIB
    with pytest.raises(InsufficientMemoryError, match="--kv-cache-memory-bytes 1048576 is less than one sequence"):
        cache_bytes(MACHINE, MIB)


def test_two_workers_share_the_fraction() -> None:
    assert kv_bytes(replace(MACHINE, fraction=0.5, workers=2)) == 3 * GIB


def test_memory_that_others_took_is_left_to_them() -> None:
    assert kv_bytes(replace(MACHINE, fraction=0.5, others=2 * GIB)) == 13 * GIB


def test_the_cpu_takes_4_gib_unless_a_number_asks_for_more() -> None:
    cpu = replace(MACHINE, kind=DeviceKind.CPU)
    assert kv_bytes(cpu) == 2 * GIB
    assert kv_bytes(replace(cpu, workers=2, sequence=GIB // 4)) == GIB
    assert 3 * GIB <= kv_bytes(replace(cpu, sequence=3 * GIB)) < 3.1 * GIB
    with pytest.raises(InsufficientMemoryError, match=r"set VLLM_METAL_MEMORY_FRACTION higher"):
        kv_bytes(replace(cpu, sequence=4 * GIB))
    assert kv_bytes(replace(cpu, fraction=0.5)) == 15 * GIB


def test_without_paging_one_sequence_and_the_placeholder_block() -> None:
    assert kv_bytes(replace(MACHINE, paged=False)) == GIB + MIB


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"fraction": 0.2},
            "One sequence of maximum length needs 1.00 GiB of KV cache and this worker has 0.60 GiB: 0.40 GiB are "
            "missing; lower --max-model-len or set VLLM_METAL_MEMORY_FRACTION higher.",
        ),
        (
            {"sequence": 48 * GIB, "fraction": 1.0},
            "One sequence of maximum length needs 48.00 GiB of KV cache and this worker has 39.00 GiB: 9.00 GiB are "
            "missing; lower --max-model-len.",
        ),
        (
            {"weights": 60 * GIB, "paged": False, "others": GIB, "workers": 2},
            "The weights (60.00 GiB) and activations (1.00 GiB) leave no memory for the KV cache: 39.00 GiB are "
            "missing; serve a smaller or more strongly quantised model or run fewer than 2 workers on this machine "
            "or end the programs that took 1.00 GiB since the start.",
        ),
        (
            {"available": int(4.5 * GIB), "stage": True},
            "One sequence of maximum length needs 1.00 GiB of KV cache and this worker has 0.50 GiB: 0.50 GiB are "
            "missing; lower --max-model-len or end other programs (4.50 GiB are available, of which 3.00 GiB stay "
            "free) or give this Mac a lower model_memory in the rack file, so that the plan puts less on it.",
        ),
    ],
)
def test_the_sentence_of_a_refusal(changed: dict[str, int], sentence: str) -> None:
    with pytest.raises(InsufficientMemoryError) as refusal:
        kv_bytes(replace(MACHINE, **changed))
    assert str(refusal.value) == sentence


@given(st.integers(0, 1 << 50))
def test_the_reserve_of_a_machine(total: int) -> None:
    assert GIB // 4 <= reserve_of(total) <= 4.25 * GIB
    assert reserve_of(total) <= reserve_of(total + GIB)


def test_what_mlx_holds_is_this_process_own() -> None:
    """Metal's buffers are not in a process's resident memory; on the CPU arrays are, and CUDA's lie elsewhere."""
    assert memory.held(GpuBackend.METAL, 3 * GIB, GIB) == 4 * GIB
    assert memory.held(None, 3 * GIB, GIB) == memory.held(None, GIB, 3 * GIB) == 3 * GIB
    start = MemorySnapshot(64 * GIB, 50 * GIB, memory.held(GpuBackend.METAL, 0, GIB // 2))
    now = MemorySnapshot(64 * GIB, 41 * GIB, memory.held(GpuBackend.METAL, 8 * GIB, 3 * GIB // 2))
    assert others_since(start, now) == 0, "8 GiB of weights and 1 GiB of imports are ours"


def test_what_mlx_keeps_of_freed_arrays_is_given_back_before_anybody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only GPU backends keep any: here a CUDA device of 80 GiB, 30 held in arrays and 20 kept of freed ones."""
    kept = [20 * GIB]
    monkeypatch.setattr(mx, "get_active_memory", lambda: 30 * GIB)
    monkeypatch.setattr(mx, "get_cache_memory", lambda: kept[0])
    monkeypatch.setattr(mx, "clear_cache", lambda: kept.__setitem__(0, 0))
    monkeypatch.setattr(
        mx,
        "device_info",
        lambda _: {"total_memory": 80 * GIB, "free_memory": 50 * GIB - kept[0], "device_name": "H100"},
    )
    gpu = Device(DeviceKind.GPU, GpuBackend.CUDA, "H100", ("bfloat16",))
    found = memory.snapshot(gpu, {})
    assert (found.available, found.own) == (50 * GIB, 30 * GIB)
    assert others_since(MemorySnapshot(80 * GIB, 80 * GIB, 0), found) == 0


def test_what_this_process_took_is_not_counted_as_others() -> None:
    start = MemorySnapshot(total=64 * GIB, available=50 * GIB, own=GIB)
    assert others_since(start, MemorySnapshot(64 * GIB, 42 * GIB, 9 * GIB)) == 0
    assert others_since(start, MemorySnapshot(64 * GIB, 40 * GIB, 9 * GIB)) == 2 * GIB
    assert others_since(start, MemorySnapshot(64 * GIB, 60 * GIB, GIB)) == 0


def test_this_machine() -> None:
    here = device.detect(Settings(device=DeviceKind.CPU))
    mx.clear_cache()
    before = memory.snapshot(here)
    assert 0 < before.own < before.total
    assert 0 < before.available <= before.total
    assert memory.memory_base(here, before) == before.total
    # Pages of its own: what malloc returned earlier in this process may be resident still and would not count as new.
    with mmap.mmap(-1, 256 * MIB) as pages:
        pages.write(b"x" * len(pages))
        assert memory.snapshot(here).own - before.own >= 200 * MIB
    assert before.reserve == reserve_of(before.total)


def write_group(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_control_group_confines(tmp_path: Path) -> None:
    assert memory.cgroup_room(tmp_path) is None
    stat = "anon 5\ninactive_file 300\n"
    two = write_group(tmp_path / "v2", {"memory.max": "1000\n", "memory.current": "800\n", "memory.stat": stat})
    assert memory.cgroup_room(two) == (1000, 500)
    assert memory.cgroup_room(write_group(two, {"memory.max": "max\n"})) is None
    one = {
        "memory/memory.limit_in_bytes": "1000",
        "memory/memory.usage_in_bytes": "800",
        "memory/memory.stat": "total_inactive_file 100\n",
    }
    assert memory.cgroup_room(write_group(tmp_path / "v1", one)) == (1000, 700)
