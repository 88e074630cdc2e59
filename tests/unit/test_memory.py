"""The KV budget: limits that hold for any machine, the rules of the settings, and the facts of this machine."""

import mmap
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pomarium.worker import device, memory
from pomarium.worker.errors import InsufficientMemoryError
from pomarium.worker.memory import GIB, MemoryFacts, MemorySnapshot, kv_bytes, minimum_kv_bytes, others_since, share
from pomarium.worker.settings import DeviceKind, Settings

MIB = 1 << 20
MACHINE = MemoryFacts(
    kind=DeviceKind.GPU,
    base=48 * GIB,
    available=40 * GIB,
    others=0,
    weights=8 * GIB,
    activations=GIB,
    workers=1,
    fraction=None,
    paged=True,
    sequence=GIB,
    block=MIB,
)

sizes = st.integers(min_value=4 * GIB, max_value=256 * GIB)
facts = st.builds(
    MemoryFacts,
    kind=st.sampled_from(DeviceKind),
    base=sizes,
    available=sizes,
    others=st.integers(min_value=0, max_value=2 * GIB),
    weights=st.integers(min_value=0, max_value=16 * GIB),
    activations=st.integers(min_value=0, max_value=GIB),
    workers=st.integers(min_value=1, max_value=4),
    fraction=st.none() | st.floats(min_value=0.05, max_value=1.0),
    paged=st.booleans(),
    sequence=st.integers(min_value=1, max_value=2 * GIB),
    block=st.integers(min_value=1, max_value=16 * MIB),
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
def test_a_cpu_worker_stays_within_what_is_available_and_auto_within_4_gib(some: MemoryFacts) -> None:
    kv = kv_or_none(replace(some, kind=DeviceKind.CPU))
    assume(kv is not None)
    assert kv + some.activations <= some.available
    if some.paged and some.fraction is None:
        assert kv * some.workers <= 4 * GIB


@given(
    facts,
    st.sampled_from(["base", "available"]) | st.sampled_from(["others", "weights", "activations", "workers"]),
    st.integers(min_value=1, max_value=16 * GIB),
)
def test_more_memory_never_gives_less_and_more_use_never_gives_more(some: MemoryFacts, name: str, step: int) -> None:
    step = 1 if name == "workers" else step
    before = kv_or_none(some)
    after = kv_or_none(replace(some, **{name: getattr(some, name) + step}))
    less, more = (before, after) if name in ("base", "available") else (after, before)
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
    plenty = replace(some, kind=DeviceKind.GPU, base=enough * some.workers, fraction=1.0)
    assert kv_bytes(plenty) == minimum_kv_bytes(some)


def test_paged_auto_is_nine_tenths_of_the_base() -> None:
    assert kv_bytes(MACHINE) == pytest.approx(0.9 * 48 * GIB - 9 * GIB, abs=MIB)
    assert kv_bytes(replace(MACHINE, fraction=0.5)) == 15 * GIB


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
    ],
)
def test_the_sentence_of_a_refusal(changed: dict[str, int], sentence: str) -> None:
    with pytest.raises(InsufficientMemoryError) as refusal:
        kv_bytes(replace(MACHINE, **changed))
    assert str(refusal.value) == sentence


@given(facts)
def test_what_is_wired_covers_what_is_taken_and_fits_the_working_set(some: MemoryFacts) -> None:
    kv = kv_or_none(some)
    assume(kv is not None)
    assert some.weights + some.activations + kv <= memory.wired_bytes(some) <= some.base


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
    memory.wire(here, GIB)


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
