"""What is wired on a Mac: all of weights and pool, nothing of a step, however Metal rounds its buffers."""

import logging

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker import wiring
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.errors import InsufficientMemoryError
from pomarium.worker.settings import DeviceKind, Wire
from pomarium.worker.wiring import HEAP_BYTES, IN_HEAP, plan, wire

PAGE = 16384
"""Of Apple silicon."""
MAC = Device(DeviceKind.GPU, GpuBackend.METAL, "Apple M4", ("bfloat16",))


class ResidencySets:
    """What mlx/backend/metal/resident.h and allocator.h say: a limit, and who gets in."""

    def __init__(self, rounding: int) -> None:
        self.rounding, self.limit, self.wired = rounding, 0, HEAP_BYTES

    def length(self, size: int) -> int:
        """What MLX counts: whole pages above one."""
        return size if size <= PAGE else -(-size // PAGE) * PAGE

    def taken(self, size: int) -> int:
        """What Metal takes; small ones lie in the heap, which is wired by itself."""
        return 0 if size <= IN_HEAP else -(-self.length(size) // self.rounding) * self.rounding

    def insert(self, size: int) -> bool:
        """Whether it is wired now."""
        fits = self.wired + self.taken(size) <= self.limit
        self.wired += self.taken(size) if fits else 0
        return fits


sizes = st.integers(1, 4 * PAGE) | st.integers(1, 1 << 30)


@given(
    st.lists(sizes, max_size=40),
    st.lists(st.integers(1, PAGE), max_size=64),
    st.sampled_from([1, 256, 4096, PAGE]),
    st.lists(st.integers(IN_HEAP + 1, 1 << 30), max_size=20),
    st.randoms(),
)
def test_all_that_stays_is_wired_and_nothing_of_a_step(
    known: list[int], unknown: list[int], rounding: int, transient: list[int], random: object
) -> None:
    """Whatever order MLX takes them in, and whatever Metal rounds to."""
    metal = ResidencySets(rounding)
    there = known + unknown
    chosen = plan(sum(map(metal.length, there)), known, PAGE)
    metal.limit = chosen.limit
    random.shuffle(there)  # type: ignore[attr-defined]
    assert set(map(metal.insert, there)) <= {True}
    for seal in chosen.seals:
        metal.insert(seal)
    assert metal.wired + metal.taken(2 * IN_HEAP) > metal.limit
    assert not any(metal.insert(size) for size in transient if size >= 2 * IN_HEAP)


@given(st.integers(0, 1 << 40), st.lists(sizes, max_size=200))
def test_the_limit_is_what_is_there_and_a_few_mib(active: int, known: list[int]) -> None:
    chosen = plan(active, known, PAGE)
    assert active < chosen.limit <= active + HEAP_BYTES + (len(known) + wiring.UNKNOWN_ARRAYS) * PAGE
    assert sum(chosen.seals) <= chosen.limit - active + 2 * PAGE


class Recorded:
    """MLX's limit, as it was set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.calls: list[str | int] = []
        monkeypatch.setattr(mx, "set_wired_limit", self.calls.append)
        monkeypatch.setattr(mx, "clear_cache", lambda: self.calls.append("cleared"))
        monkeypatch.setattr(mx, "device_info", lambda device: {"max_recommended_working_set_size": most})


def test_the_pool_is_wired_once_behind_a_cleared_cache_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded, arrays = Recorded(monkeypatch, 1 << 40), [mx.zeros((1 << 20,)), mx.zeros((3,))]
    mx.eval(arrays)
    with caplog.at_level(logging.INFO, "pomarium"):
        kept = wire(MAC, Wire.POOL, arrays)
    first, limit = recorded.calls
    assert first == "cleared"
    assert isinstance(limit, int)
    assert limit >= 4 << 20
    assert [record.getMessage() for record in caplog.records] == [
        f"Wired memory: weights and KV pool, {limit >> 20} MiB, set once (POMARIUM_WIRE=pool)."
    ]
    assert kept is not None


def test_off_sets_no_limit_and_says_what_to_try(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(monkeypatch, 1 << 40)
    with caplog.at_level(logging.INFO, "pomarium"):
        wire(MAC, Wire.OFF, [])
    assert recorded.calls == []
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("Wired memory: none (POMARIUM_WIRE=off).")
    assert line.endswith("try POMARIUM_WIRE=pool.")


@pytest.mark.parametrize("backend", [None, GpuBackend.CUDA])
def test_elsewhere_nothing_is_wired(
    backend: GpuBackend | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded = Recorded(monkeypatch, 1 << 40)
    elsewhere = Device(DeviceKind.GPU if backend else DeviceKind.CPU, backend, "some device", ("float32",))
    with caplog.at_level(logging.INFO, "pomarium"):
        wire(elsewhere, Wire.OFF, [])
        assert not caplog.records
        wire(elsewhere, Wire.POOL, [])
    assert recorded.calls == []
    assert "has no effect here" in caplog.text


def test_more_than_macos_allows_is_refused_before_a_limit_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Recorded(monkeypatch, 1 << 20)
    with pytest.raises(InsufficientMemoryError, match=r"macOS allows 1 MiB: set it to off.*iogpu\.wired_limit_mb"):
        wire(MAC, Wire.POOL, [mx.zeros((8,))])
    assert recorded.calls == ["cleared"]
