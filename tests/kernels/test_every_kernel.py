"""Every case of every kernel, on the emulator, in three orders of threads, within its bound.

    kernels/check.py: all_cases --EmulatedLauncher (capture, front-end check, run)--> error <= bound

The same cases run on a GPU in `pomarium selftest` and benchmarks/kernels_gpu.py. Operations have further tests of their
own beside this file.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from emulator.launcher import EmulatedLauncher

from pomarium.kernels.cases.case import Case
from pomarium.kernels.check import Report, all_cases, run
from pomarium.kernels.launch import FOLDER, KernelSource, Launch

ORDERS = (0, 1, 2)
CASES = {case.name: case for case in all_cases()}


@pytest.fixture(scope="module", params=ORDERS, ids=lambda order: f"order {order}")
def launcher(request: pytest.FixtureRequest) -> EmulatedLauncher:
    return EmulatedLauncher(order=request.param)


def test_names_are_unique() -> None:
    assert len(CASES) == len(list(all_cases()))


def test_every_file_of_cases_is_taken() -> None:
    """A file that check.all_cases forgot would run nowhere."""
    text = (FOLDER / "check.py").read_text()
    imported = text.partition("from pomarium.kernels.cases import ")[2].partition("\n")[0].split(", ")
    assert set(imported) == {path.stem for path in (FOLDER / "cases").glob("*.py")} - {"case"}


@pytest.mark.parametrize("name", CASES)
def test_within_the_bound(name: str, launcher: EmulatedLauncher) -> None:
    case = CASES[name]
    results = case.run(launcher)
    mx.eval(results)
    assert case.error(results) <= case.bound


class _Nothing:
    """A launcher of kernels that write nothing."""

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        return [mx.full(shape, float("nan"), mx.float32).astype(dtype) for shape, dtype in launch.outputs]


def test_kernels_that_write_nothing_are_all_reported() -> None:
    """No case passes by its inputs alone, and not-a-numbers are errors."""
    report = run(_Nothing())
    assert [each.name for each in report.failed] == list(CASES)


@pytest.mark.parametrize("relative", [False, True])
def test_an_error_is_measured(relative: bool) -> None:
    case = Case("", lambda _: [], lambda: [np.array([2.0, -4.0])], 0.1, relative)
    assert case.error([mx.array([2.0, -4.5])]) == (0.125 if relative else 0.5)
    assert np.isnan(case.error([mx.array([float("nan"), -4.0])]))
    with pytest.raises(ValueError, match="are not"):
        case.error([mx.array([2.0])])


def test_a_case_that_raises_leaves_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launcher: object) -> list[mx.array]:
        raise RuntimeError("no such word")

    broken = replace(next(iter(CASES.values())), run=fail)
    monkeypatch.setattr("pomarium.kernels.check.all_cases", lambda seed: iter([broken]))
    report: Report = run(_Nothing())
    assert not report.outcomes[0].passed
    assert "no such word" in report.text
    assert "0 of 1 cases" in report.text
