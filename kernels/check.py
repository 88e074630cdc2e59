"""Does this GPU compute what the kernels promise? Every kernel on small random inputs, against float64 on the host.

    kernels/cases/*.py --all_cases(seed)--> Cases --run(launcher)--> Report --text--> a table to paste

The same cases run on the emulator (tests/kernels/test_every_kernel.py), in `pomarium selftest`, and on CUDA
(benchmarks/kernels_gpu.py). `PoisonedLauncher` makes what a kernel forgets to write show.
"""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx
import numpy as np

from pomarium.kernels.launch import KernelSource, Launch, Launcher, MlxLauncher, call, cuda_kernel, metal_kernel


@dataclass(frozen=True)
class Case:
    """One use of kernels, and what it has to give.

    Attributes:
        run: launches them; its results, lazily.
        expected: the same results in float64, of the inputs as rounded to the kernels' dtype.
        bound: largest difference of any element. relative: of the largest expected value, not absolute.
    """

    name: str
    run: Callable[[Launcher], list[mx.array]]
    expected: Callable[[], list[np.ndarray]]
    bound: float
    relative: bool = False

    def error(self, results: list[mx.array]) -> float:
        """The largest difference, in units of `bound`'s; not-a-number if a result holds one.

        Raises:
            ValueError: number or shape of the results differ from what is expected.
        """
        expected = self.expected()
        if [array.shape for array in results] != [array.shape for array in expected]:
            shapes = [array.shape for array in results], [array.shape for array in expected]
            raise ValueError(f"{self.name}: results {shapes[0]} are not {shapes[1]}")
        largest = 0.0
        for got, want in zip(results, expected, strict=True):
            difference = np.abs(np.array(got.astype(mx.float32)).astype(np.float64) - want).max()
            largest = float(np.maximum(largest, difference / np.abs(want).max() if self.relative else difference))
        return largest


@dataclass(frozen=True)
class Outcome:
    """Of one case.

    Attributes:
        error: see Case.error; not-a-number if it could not be run. failure: what was raised instead.
        seconds: with compilation, for the first case of each specialisation.
    """

    name: str
    error: float
    bound: float
    seconds: float
    failure: Exception | None = None

    @property
    def passed(self) -> bool:
        """Whether every element is within the bound."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Report:
    """Of all cases."""

    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """Those out of bounds or not run."""
        return tuple(outcome for outcome in self.outcomes if not outcome.passed)

    @property
    def text(self) -> str:
        """A Markdown table, the tracebacks, and a line with the count."""
        lines = ["| kernel | largest error | bound | s | |", "|---|---:|---:|---:|---|"]
        for each in self.outcomes:
            verdict = "ok" if each.passed else "WRONG" if each.failure is None else "FAILED"
            lines.append(f"| {each.name} | {each.error:.1e} | {each.bound:.1e} | {each.seconds:.1f} | {verdict} |")
        lines += [
            f"\n{each.name}:\n{''.join(traceback.format_exception(each.failure))}"
            for each in self.outcomes
            if each.failure is not None
        ]
        right = len(self.outcomes) - len(self.failed)
        return "\n".join([*lines, f"\n{right} of {len(self.outcomes)} cases are right."])


def all_cases(seed: int = 0) -> Iterator[Case]:
    """Every case of every operation, with random inputs of `seed`."""
    # The case modules import Case from here.
    from pomarium.kernels.cases import cache_writes, gated_delta, mla, order, paged_attention

    yield from cache_writes.cases(seed)
    yield from order.cases()
    yield from paged_attention.cases(seed)
    yield from mla.cases()
    yield from (replace(case, relative=True) for case in gated_delta.cases(seed))


def run(launcher: Launcher, seed: int = 0) -> Report:
    """Run all cases; a case that raises is reported, and the others go on."""
    return Report(tuple(outcome(case, launcher) for case in all_cases(seed)))


def outcome(case: Case, launcher: Launcher) -> Outcome:
    """Run one case; what it raises is part of the outcome."""
    began = time.perf_counter()
    try:
        results = case.run(launcher)
        mx.eval(results)
        seconds = time.perf_counter() - began
        return Outcome(case.name, case.error(results), case.bound, seconds)
    except Exception as error:  # noqa: BLE001 - whatever a GPU's compiler or driver raises belongs into the report
        return Outcome(case.name, float("nan"), case.bound, time.perf_counter() - began, error)


class PoisonedLauncher(MlxLauncher):
    """This machine's GPU, with every output full of not-a-numbers before a kernel writes it. For checks: slower."""

    def __init__(self) -> None:
        super().__init__(metal_kernel if mx.metal.is_available() else cuda_kernel)

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        return call(partial(self.kernel(source), init_value=float("nan")), launch)
