"""Kernels whose body stands in a test, or has been changed."""

from dataclasses import dataclass

from pomarium.kernels.launch import KernelSource


@dataclass(frozen=True)
class InlineSource(KernelSource):
    """A KernelSource with its body."""

    body: str = ""

    @property
    def text(self) -> str:
        """The body."""
        return self.body
