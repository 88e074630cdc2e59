"""Does each kernel compile on this GPU, by itself? All its specialisations that the cases use, launched alone.

    cases --Collector (launches nothing)--> launches by kernel --compile_kernel--> Compiled, or CompileError

A case launches several kernels, and MLX compiles when a result is evaluated: an error in a case says that one of its
kernels does not compile. Here the inputs that another kernel would have made are zeros; results are not looked at.
"""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import mlx.core as mx

from pomarium.kernels.cases.case import Case
from pomarium.kernels.launch import KernelSource, Launch, Launcher


@dataclass(frozen=True)
class Compiled:
    """One kernel. seconds: for all its variants, first launches included."""

    variants: int
    seconds: float


class CompileError(RuntimeError):
    """A variant could not be compiled or launched; the first line names it, then comes what MLX said."""


class Collector:
    """A launcher that keeps what it is given, once for each specialisation, and makes zeros."""

    def __init__(self) -> None:
        self.launches: dict[str, dict[object, tuple[KernelSource, Launch]]] = {}

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        kinds = tuple((array.dtype, array.size < 8) for array in launch.inputs)
        special = launch.template, kinds, tuple(dtype for _, dtype in launch.outputs)
        self.launches.setdefault(source.name, {}).setdefault(special, (source, launch))
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]


def collect(cases: Iterable[Case]) -> dict[str, list[tuple[KernelSource, Launch]]]:
    """Kernel -> its launches, of each specialisation the first, in the order of their use."""
    collector = Collector()
    for case in cases:
        case.run(collector)
    return {name: list(found.values()) for name, found in collector.launches.items()}


def kernels_of(case: Case) -> frozenset[str]:
    """The names of the kernels that a case launches."""
    return frozenset(collect([case]))


def compile_kernel(launcher: Launcher, launches: Iterable[tuple[KernelSource, Launch]]) -> Compiled:
    """Launch each of `launches` alone. Raises CompileError for the first that fails."""
    began = time.perf_counter()
    count = 0
    for source, launch in launches:
        mx.eval(launch.inputs)
        try:
            mx.eval(launcher.launch(source, launch))
        except Exception as error:
            template = ", ".join(f"{name}={value}" for name, value in launch.template).replace("mlx.core.", "")
            raise CompileError(f"with {template}\n{error}") from error
        count += 1
    return Compiled(count, time.perf_counter() - began)
