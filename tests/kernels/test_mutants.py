"""The faults that `make mutants` plants are what it says; every barrier in every kernel is needed, and seen to be."""

import re
from collections import Counter

import pytest
from emulator.mutants import explanations, judge, key_of, planned
from emulator.mutate import Mutant, mutants

from pomarium.kernels.launch import FOLDER

BODY = """const int lane = int(thread_index_in_simdgroup);
threadgroup float s_x[32];
float total = 0.0f;
s_x[lane] = x[lane];
threadgroup_barrier(mem_flags::mem_threadgroup);
for (int i = 0; i < 4; i++) {
  total += s_x[work[i * 4 + 2]];  // not x[i < 3]
}
if (total > 0.0f) {
  const device T* from = (const device T*)x;
  y[lane] = simd_sum(total) + from[tables[i / BS]];
}
"""

EXPECTED = {
    (5, "drop a barrier", ";"),
    (5, "a barrier that orders nothing", "threadgroup_barrier(mem_flags::mem_none);"),
    (5, "return before a barrier", "if (thread_index_in_simdgroup == 7u) return; threadgroup_barrier("),
    (11, "diverge around a simd call", "(thread_index_in_simdgroup < 16u ? simd_sum(total) : decltype(simd_sum("),
    (4, "shift an index", "s_x[lane + 1] = x[lane];"),
    (4, "shift an index", "s_x[lane] = x[lane + 1];"),
    (7, "shift an index", "s_x[work[i * 4 + 2] + 1];"),
    (7, "shift an index", "s_x[work[i * 4 + 2 + 1]];"),
    (7, "a neighbouring column", "s_x[work[i * 4 + 3]];"),
    (11, "shift an index", "y[lane + 1] ="),
    (11, "shift an index", "from[tables[i / BS] + 1];"),
    (11, "shift an index", "from[tables[i / BS + 1]];"),
    (11, "a neighbouring column", "from[tables[(i / BS) ^ 1]];"),
    (6, "shift a bound", "i <= 4"),
    (9, "shift a bound", "total >= 0.0f"),
    (3, "drop an initialiser", "float total;"),
    (2, "change an address space", "thread float s_x[32];"),
    (10, "change an address space", "const threadgroup T* from = (const device T*)x;"),
    (10, "change an address space", "const device T* from = (const threadgroup T*)x;"),
    (1, "write through const", "((device uint*)x)[0] = 0u; const int lane"),
}


def test_each_operator_does_what_it_says() -> None:
    made = mutants(BODY, ("x",))
    for line, operator, after in EXPECTED:
        found = [each for each in made if (each.line, each.operator) == (line, operator) and after in each.after]
        assert len(found) == 1, (line, operator, after)
    assert len(made) == len(EXPECTED)


def test_a_mutant_differs_in_one_line() -> None:
    for mutant in mutants(BODY, ("x",)):
        pairs = zip(BODY.splitlines(), mutant.text.splitlines(), strict=True)
        changed = [number for number, (old, new) in enumerate(pairs, 1) if old != new]
        assert changed == [mutant.line], mutant.operator


KERNELS = tuple(sorted(path.stem for path in (FOLDER / "metal").glob("*.metal")))
DROPPED = [(kernel, mutant) for kernel, mutant in planned(KERNELS) if mutant.operator == "drop a barrier"]


def test_every_barrier_is_among_the_mutants() -> None:
    """And only barriers are."""
    texts = {kernel: re.sub("//.*", "", (FOLDER / "metal" / f"{kernel}.metal").read_text()) for kernel in KERNELS}
    barriers = {kernel: text.count("_barrier(") for kernel, text in texts.items() if "_barrier(" in text}
    assert Counter(kernel for kernel, _ in DROPPED) == barriers


@pytest.mark.parametrize(("kernel", "mutant"), DROPPED, ids=[f"{kernel}:{mutant.line}" for kernel, mutant in DROPPED])
def test_a_missing_barrier_is_seen(kernel: str, mutant: Mutant) -> None:
    assert judge(kernel, mutant).by == "emulator"


def test_explanations_are_of_mutants_that_there_are() -> None:
    there = {key_of(kernel, each) for kernel, each in planned(KERNELS)}
    assert set(explanations()) <= there


def test_mutants_that_read_the_same_are_told_apart() -> None:
    made = mutants("a[0] = b;\na[0] = b;\na[1] = b;\n", ())
    keys = [key_of("k", mutant) for mutant in made if mutant.operator == "shift an index"]
    assert [head for head, _, _ in keys] == ["k: shift an index", "k: shift an index (2)", "k: shift an index"]
