"""A launcher that keeps account of what is launched."""

from collections import Counter
from dataclasses import dataclass, field

import mlx.core as mx
from emulator.launcher import EmulatedLauncher

from pomarium.kernels.launch import KernelSource, Launch


@dataclass
class CountingLauncher:
    """Runs each launch on the emulator.

    Attributes:
        rows: of each launch, the kernel's name and the length of its first input, of a kernel that attends its queries.
        stores: launches that stored a layer's K and V, by the kernel for it or by attention.
    """

    inner: EmulatedLauncher = field(default_factory=EmulatedLauncher)
    rows: list[tuple[str, int]] = field(default_factory=list)
    stores: int = 0

    @property
    def launches(self) -> Counter[str]:
        """By kernel."""
        return Counter(name for name, _ in self.rows)

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        self.rows.append((source.name, launch.inputs[0].shape[0]))
        self.stores += source.name == "reshape_and_cache" or ("STORE", True) in launch.template
        return self.inner.launch(source, launch)
