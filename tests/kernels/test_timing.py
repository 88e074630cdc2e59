"""The kernels' part of `pomarium selftest`, checks and times, with the emulator in the place of a GPU."""

from functools import partial
from itertools import islice

import pytest
from emulator.launcher import EmulatedLauncher

from pomarium.kernels import check, timing
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.timing import Sizes, Timing
from pomarium.worker import selftest_kernels

SMALL = Sizes(4, 2, 64, 2, 32, 16, 8, 2, 2, 16, 1 << 10)


def test_every_workload_runs_and_has_a_rate() -> None:
    measured = timing.measure(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL, rounds=1)
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
    by_name = {each.name: each.nbytes for each in timing.workloads(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL)}
    assert by_name["paged_attention_decode, 2 x 32 keys"] == 2 * 32 * 2 * 64 * 2 * 2
    assert by_name["gdn_recurrent_decode, 2 states"] == 2 * 2 * 16 * 16 * 4 * 2


def test_the_table() -> None:
    assert timing.text([Timing("copy", 2.0, 10**9)]).splitlines()[-1] == "| copy | 2.000 | 500 |"


ALL_CASES, MEASURE = check.all_cases, timing.measure


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_kernels, "launcher_of", lambda device: EmulatedLauncher())
    monkeypatch.setattr(check, "PoisonedLauncher", EmulatedLauncher)
    monkeypatch.setattr(check, "all_cases", lambda seed: islice(ALL_CASES(seed), 3))
    monkeypatch.setattr(timing, "measure", partial(MEASURE, sizes=SMALL, rounds=1))


@pytest.mark.usefixtures("gpu")
def test_the_report_has_every_case_and_the_times() -> None:
    report = selftest_kernels.run()
    assert report is not None
    assert report.passed
    text = report.text()
    assert "3 of 3 cases are right." in text
    assert "| mla_decode, 2 x 32 latents |" in text


@pytest.mark.usefixtures("gpu")
def test_a_wrong_kernel_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check.Case, "error", lambda case, results: 1.0)
    report = selftest_kernels.run()
    assert report is not None
    assert not report.passed
    assert "WRONG" in report.text()


def test_without_a_gpu_there_is_nothing_to_run() -> None:
    assert selftest_kernels.run() is None
