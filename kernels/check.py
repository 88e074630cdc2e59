"""Does this GPU compute what the kernels promise? Every kernel on small random inputs, against float64 on the host.

    kernels/cases/*.py --all_cases(seed)--> Cases --run(launcher)--> Report --text--> a table to paste

The same cases run on the emulator (tests/kernels/test_every_kernel.py), in `pomarium selftest`, and on CUDA
(benchmarks/kernels_gpu.py). `PoisonedLauncher` makes what a kernel forgets to write show.
"""

import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from pomarium.kernels.cases import cache_writes, gated_delta, mla, order, paged_attention
from pomarium.kernels.cases.case import Case
from pomarium.kernels.launch import KernelSource, Launch, Launcher, MlxLauncher, call, cuda_kernel, metal_kernel


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
