"""Does this machine's GPU compute what the kernels promise, in the order that they promise, and how fast?

    compiled (each kernel by itself) --> checked (cases against float64, outputs poisoned) --> timed (beside a copy)

For `pomarium selftest`: each yields events and can go on behind what an earlier process did not survive. On a machine
without a GPU there is nothing to run: attention is MLX operations there.
"""

import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from pomarium.kernels import check, compile_check, timing
from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import Launcher
from pomarium.worker.attention.choose import launcher_of
from pomarium.worker.device import use
from pomarium.worker.selftest_rows import Begin, Event, Row, Verdict, fact, failure
from pomarium.worker.settings import load as load_settings


@dataclass(frozen=True)
class Launchers:
    """Attributes:
    poisoned: fills outputs with not-a-numbers before. plain: as the worker launches.
    """

    poisoned: Launcher
    plain: Launcher


def gpu_launchers() -> Launchers | None:
    """This machine's; None without a GPU. Raises SettingsError or DeviceError as `use` does."""
    plain = launcher_of(use(load_settings(os.environ)))
    return None if plain is None else Launchers(check.PoisonedLauncher(), plain)


def compiled(done: Collection[str]) -> Iterator[Event]:
    """A row for each kernel but those in `done`."""
    if (launchers := gpu_launchers()) is None:
        yield Row("all kernels", Verdict.NOT_RUN, "there is no GPU here, attention runs as MLX operations")
        return
    for name, launches in compile_check.collect(check.all_cases()).items():
        if name in done:
            continue
        yield Begin(name)
        try:
            seen = compile_check.compile_kernel(launchers.poisoned, launches)
        except compile_check.CompileError as error:
            yield Row(name, Verdict.FAILED, f"does not compile {_first(error)}", failure(name, error).detail[:-1])
            continue
        yield Row(name, Verdict.OK, f"{seen.variants} variants, {seen.seconds:.1f} s")


def checked(done: Collection[str], broken: Collection[str]) -> Iterator[Event]:
    """A row for each case but those in `done`; `broken`: the kernels that do not compile."""
    if (launchers := gpu_launchers()) is None:
        return
    for case in check.all_cases():
        if case.name in done:
            continue
        if missing := sorted(compile_check.kernels_of(case) & set(broken)):
            yield Row(case.name, Verdict.NOT_RUN, f"{missing[0]} does not compile")
            continue
        yield Begin(case.name)
        yield _row(check.outcome(case, launchers.poisoned))


def timed(done: Collection[str], sizes: timing.Sizes | None = None, rounds: int = timing.ROUNDS) -> Iterator[Event]:
    """A row for each of the main kernels but those in `done`."""
    if (launchers := gpu_launchers()) is None:
        return
    for name, make in timing.makers(launchers.plain, this_gpu(), sizes or timing.Sizes()):
        if name in done:
            continue
        yield Begin(name)
        yield _timing(name, make, rounds)


def _row(outcome: check.Outcome) -> Row:
    if outcome.failure is not None:
        return failure(outcome.name, outcome.failure)
    verdict = Verdict.OK if outcome.passed else Verdict.WRONG
    text = f"error {outcome.error:.1e}, bound {outcome.bound:.1e}, {outcome.seconds:.1f} s"
    return Row(outcome.name, verdict, text)


def _timing(name: str, make: Callable[[], timing.Workload], rounds: int) -> Row:
    try:
        seen = timing.time_one(make(), rounds)
    except Exception as error:  # noqa: BLE001 - as of the checks
        return failure(name, error)
    return fact(name, f"{seen.milliseconds:.3f} ms, {seen.rate:.0f} GB/s ({seen.name})")


def _first(error: Exception) -> str:
    return str(error).splitlines()[0]
