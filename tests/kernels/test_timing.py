"""The kernels' part of `pomarium selftest`, checks and times, with the emulator in the place of a GPU."""

from collections.abc import Iterable

import pytest
from emulator.launcher import EmulatedLauncher

from pomarium.kernels import check, compile_check, timing
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import FOLDER
from pomarium.kernels.timing import Sizes
from pomarium.worker import selftest_kernels
from pomarium.worker.selftest_rows import Event, Row, Verdict

SMALL = Sizes(4, 2, 64, 2, 32, 16, 8, 2, 2, 16, 1 << 10)


def test_every_workload_runs_and_has_a_rate() -> None:
    makers = timing.makers(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL)
    measured = [timing.time_one(make(), rounds=1) for _, make in makers]
    assert [each.name.partition(",")[0] for each in measured] == [
        "copy",
        "reshape_and_cache",
        "paged_attention_decode",
        "paged_attention_decode",
        "paged_attention_prefill",
        "mla_decode",
        "gdn_recurrent_decode",
    ]
    assert all(each.rate > 0 for each in measured)


def test_bytes_are_those_that_have_to_move() -> None:
    """One decode step reads all K and V once; states are read and written."""
    workloads = [make() for _, make in timing.makers(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL)]
    by_name = {each.name: each.nbytes for each in workloads}
    assert by_name["paged_attention_decode, 2 x 32 keys"] == 2 * 32 * 2 * 64 * 2 * 2
    assert by_name["gdn_recurrent_decode, 2 states"] == 2 * 2 * 16 * 16 * 4 * 2


ALL_CASES = check.all_cases


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emulator = EmulatedLauncher()
    monkeypatch.setattr(selftest_kernels, "gpu_launchers", lambda: selftest_kernels.Launchers(emulator, emulator))
    writes = [case for case in ALL_CASES() if case.name.startswith("cache writes, ")][:3]
    monkeypatch.setattr(check, "all_cases", lambda seed=0: iter(writes))


def rows(events: Iterable[Event]) -> list[Row]:
    return [event for event in events if isinstance(event, Row)]


@pytest.mark.usefixtures("gpu")
def test_every_kernel_case_and_time_is_a_row() -> None:
    compiled = rows(selftest_kernels.compiled([]))
    assert [(row.name, row.verdict, row.text[:11]) for row in compiled] == [
        ("reshape_and_cache", Verdict.OK, "3 variants,"),
        ("copy_blocks", Verdict.OK, "3 variants,"),
    ]
    checked = rows(selftest_kernels.checked([], []))
    assert [row.verdict for row in checked] == [Verdict.OK] * 3
    timed = rows(selftest_kernels.timed([], SMALL, 1))
    assert len(timed) == 7
    assert all("GB/s" in row.text and not row.failed for row in timed)


@pytest.mark.usefixtures("gpu")
def test_what_is_done_or_broken_is_not_run_again() -> None:
    assert [row.name for row in rows(selftest_kernels.compiled(["reshape_and_cache"]))] == ["copy_blocks"]
    first, *others = rows(selftest_kernels.checked([], ["copy_blocks"]))
    assert (first.verdict, first.text) == (Verdict.NOT_RUN, "copy_blocks does not compile")
    assert [row.name for row in rows(selftest_kernels.checked([first.name], []))] == [row.name for row in others]


@pytest.mark.usefixtures("gpu")
def test_a_wrong_result_fails_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.Case, "error", lambda case, results: 1.0)
    assert {row.verdict for row in rows(selftest_kernels.checked([], []))} == {Verdict.WRONG}


def test_each_kernel_is_compiled_by_itself() -> None:
    """All kernels are among the launches of all cases."""
    names = {path.stem for path in (FOLDER / "metal").glob("*.metal")}
    assert set(compile_check.collect(ALL_CASES())) == names


def test_without_a_gpu_there_is_nothing_to_run() -> None:
    assert [row.verdict for row in rows(selftest_kernels.compiled([]))] == [Verdict.NOT_RUN]
    assert rows(selftest_kernels.checked([], [])) == []
    assert rows(selftest_kernels.timed([])) == []
