"""A machine that is told to have less memory than it has computes with that."""

import subprocess
import sys

import pytest

from pomarium.worker.device import detect
from pomarium.worker.errors import SettingsError
from pomarium.worker.memory import (
    MACHINE_MEMORY,
    MemorySnapshot,
    limited,
    machine_limit,
    memory_base,
    others_since,
    snapshot,
)
from pomarium.worker.settings import load

GIB = 1 << 30


def test_the_limit_bounds_base_and_what_is_available() -> None:
    here = detect(load({}))
    found = snapshot(here, {MACHINE_MEMORY: str(GIB)})
    assert found.total == GIB
    assert memory_base(here, found) == GIB
    assert found.available <= max(0, GIB - found.own)
    assert snapshot(here, {}).total > GIB


def test_what_this_process_takes_counts_against_the_limit_and_not_as_others() -> None:
    before = limited(MemorySnapshot(16 * GIB, 12 * GIB, GIB), 4 * GIB)
    after = limited(MemorySnapshot(16 * GIB, 10 * GIB, 3 * GIB), 4 * GIB)
    assert (before.available, after.available) == (3 * GIB, GIB)
    assert others_since(before, after) == 0


def test_a_limit_above_the_machine_changes_nothing() -> None:
    found = MemorySnapshot(16 * GIB, 12 * GIB, GIB)
    assert limited(found, 32 * GIB) == limited(found, None) == found


def test_memory_that_others_took_is_missing_below_the_limit_too() -> None:
    assert limited(MemorySnapshot(16 * GIB, GIB, GIB), 8 * GIB).available == GIB


@pytest.mark.parametrize("text", ["", "0", "-1", "4GiB", "1e9", "٣", "9" * 30])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=MACHINE_MEMORY):
        machine_limit({MACHINE_MEMORY: text})


HOLD_ARRAYS = f"""
import mlx.core as mx
from pomarium.worker.device import detect
from pomarium.worker.memory import snapshot
from pomarium.worker.settings import load
limit = {{"{MACHINE_MEMORY}": "{8 * GIB}"}}
before = snapshot(detect(load({{}})), limit)
held = mx.zeros((50 << 20,), mx.float32)
mx.eval(held)
print(snapshot(detect(load({{}})), limit).own - before.own)
"""


def test_arrays_are_seen_under_a_limit() -> None:
    """In a process of its own: this one may give the arrays memory that it held before."""
    done = subprocess.run([sys.executable, "-c", HOLD_ARRAYS], capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) >= 150 << 20
