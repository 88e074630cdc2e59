"""Does this machine's GPU compute what the kernels promise, in the order that they promise, and how fast?

    kernels.check (every kernel against float64, outputs poisoned, order of in-place writes) --+--> KernelReport
    kernels.timing (the main ones beside a plain copy) ----------------------------------------+

For `pomarium selftest`. On a machine without a GPU there is nothing to run: attention is MLX operations there.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.kernels import check, timing
from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.timing import Timing
from pomarium.worker.attention.choose import launcher_of
from pomarium.worker.device import use
from pomarium.worker.settings import load as load_settings


@dataclass(frozen=True)
class KernelReport:
    """Attributes:
    checks: of every case of every kernel. timings: of the main kernels.
    """

    checks: check.Report
    timings: Sequence[Timing]

    @property
    def passed(self) -> bool:
        """True if every case is right."""
        return not self.checks.failed

    def text(self) -> str:
        """Two tables to paste."""
        return f"{self.checks.text}\n\n{timing.text(self.timings)}"


def run() -> KernelReport | None:
    """Run it; None without a GPU. Raises SettingsError if the environment asks for a GPU that is absent."""
    launcher = launcher_of(use(load_settings(os.environ)))
    if launcher is None:
        return None
    return KernelReport(check.run(check.PoisonedLauncher()), timing.measure(launcher, this_gpu()))
