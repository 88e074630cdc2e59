"""One call for every kernel, whatever runs it.

    KernelSource (a Metal body, its inputs and outputs) --+
    Launch (arrays, template, grid, output shapes) -------+--Launcher.launch--> outputs
        MetalLauncher      mx.fast.metal_kernel
        CudaLauncher       mx.fast.cuda_kernel, behind a prelude that gives the body's Metal words a meaning in CUDA
        tests/emulator     the text that MLX would hand to Metal's compiler, run on the CPU

A body is what stands between the braces of a kernel function, in Metal's language, in kernels/metal/NAME.metal, with
its contract as a comment at the top; kernels/metal/common.h stands before each function. MLX writes the function's
head: inputs as `const device` pointers (arrays of fewer than 8 elements as `constant`), outputs as `device` pointers,
the template's names, and the attributes such as thread_position_in_grid that the body mentions.

MLX always allocates a kernel's outputs. A body that writes an input in place casts its `const` away, and the source
names that input in `in_place`; the order of such writes is kernels/ordered.py's. Parameters are 1-d arrays, for 0-d
inputs are references on Metal and pointers on CUDA. The grid is a multiple of the threadgroup, for CUDA rounds up.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

FOLDER = Path(__file__).resolve().parent
MOST_THREADS = 1024
"""Of a threadgroup, on all Apple and NVIDIA GPUs."""

Scalar = int | bool | mx.Dtype
"""A template argument."""

_THREADGROUP_VARIABLE = re.compile(
    r"\bthreadgroup\s+([A-Za-z_][\w:]*(?:<[^;<>]*>)?)\s+([A-Za-z_]\w*)\s*((?:\[[^\]]*\])+)\s*;"
)


@dataclass(frozen=True)
class KernelSource:
    """A Metal body and its signature.

    Attributes:
        name: also the file's, kernels/metal/{name}.metal. inputs, outputs: the names that the body uses.
        in_place: the inputs that it writes.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    in_place: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not set(self.in_place) <= set(self.inputs):
            raise ValueError(f"{self.name} writes {self.in_place} in place, but its inputs are {self.inputs}")

    @property
    def text(self) -> str:
        """The body."""
        return _read(f"metal/{self.name}.metal")


def common_text() -> str:
    """What stands before each kernel function."""
    return _read("metal/common.h")


@cache
def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


@dataclass(frozen=True)
class Launch:
    """What one launch of a kernel takes and makes.

    Attributes:
        inputs: row-major arrays with at least one element and one axis.
        template: name and value; dtypes become type names, ints and bools constants.
        grid: threads in each axis, a multiple of the threadgroup. threadgroup: threads in each axis.
        outputs: shape and dtype of each.

    Raises:
        ValueError: an input is empty or 0-d, or grid and threadgroup do not fit each other or the hardware.
    """

    inputs: tuple[mx.array, ...]
    template: tuple[tuple[str, Scalar], ...]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    outputs: tuple[tuple[tuple[int, ...], mx.Dtype], ...]

    def __post_init__(self) -> None:
        for place, array in enumerate(self.inputs):
            if array.size == 0 or array.ndim == 0:
                raise ValueError(f"input {place} has shape {array.shape}: kernels take arrays with elements")
        x, y, z = self.threadgroup
        if min(x, y, z) < 1 or x * y * z > MOST_THREADS:
            raise ValueError(f"a threadgroup of {self.threadgroup} threads is not within 1 to {MOST_THREADS}")
        across, down, deep = self.grid
        if min(across, down, deep) < 1 or across % x or down % y or deep % z:
            raise ValueError(f"a grid of {self.grid} threads is no multiple of the threadgroup {self.threadgroup}")


class Launcher(Protocol):
    """Runs kernels on one kind of device."""

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """Queue a launch; its outputs, lazily."""
        ...


class MlxLauncher:
    """Through a maker of MLX's kernel objects. MLX compiles a kernel once for each template and keeps it."""

    def __init__(self, make: Callable[[KernelSource], Any]) -> None:
        self._make = make
        self._kernels: dict[str, Any] = {}

    def kernel(self, source: KernelSource) -> Any:
        """MLX's kernel object of `source`, made once."""
        if source.name not in self._kernels:
            self._kernels[source.name] = self._make(source)
        return self._kernels[source.name]

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """See Launcher."""
        return call(self.kernel(source), launch)


class MetalLauncher(MlxLauncher):
    """On an Apple GPU."""

    def __init__(self) -> None:
        super().__init__(metal_kernel)


class CudaLauncher(MlxLauncher):
    """On an NVIDIA GPU through MLX's CUDA backend."""

    def __init__(self) -> None:
        super().__init__(cuda_kernel)


def metal_kernel(source: KernelSource) -> Any:
    """MLX's kernel object of `source`; also what the emulator takes the generated text from."""
    return mx.fast.metal_kernel(
        name=source.name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        header=common_text(),
        source=source.text,
    )


def cuda_kernel(source: KernelSource) -> Any:
    """The same behind the prelude, for MLX's CUDA backend."""
    return mx.fast.cuda_kernel(
        name=source.name,
        input_names=list(source.inputs),
        output_names=list(source.outputs),
        header=cuda_header(),
        source=cuda_body(source.text),
    )


def call(kernel: Any, launch: Launch) -> list[mx.array]:
    """Call MLX's kernel object."""
    outputs: list[mx.array] = kernel(
        inputs=list(launch.inputs),
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=[shape for shape, _ in launch.outputs],
        output_dtypes=[dtype for _, dtype in launch.outputs],
    )
    return outputs


def cuda_header() -> str:
    """The prelude, and what stands before each function on Metal too."""
    return _read("cuda/prelude.h") + common_text()


def cuda_body(text: str) -> str:
    """A body for CUDA: declarations of threadgroup memory are all that cannot be said by the prelude."""
    return _THREADGROUP_VARIABLE.sub(r"__shared__ \1 \2\3;", text)
