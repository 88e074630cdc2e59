"""Launches kernels on the emulator: a Launcher like those for GPUs.

    launch --capture (MLX's text)--> check (front end) --translate, build--> run --> outputs, and changed inputs

Everything happens at once, not lazily: the order of in-place writes is the order of calls.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from emulator.build import compiler
from emulator.capture import capture
from emulator.frontend import check
from emulator.memory import FILL
from emulator.run import MOST_SECONDS, Buffer, Kernel, KernelError, Machine, Order, compiled

from pomarium.kernels.launch import KernelSource, Launch, Scalar

CONSTANT_BELOW = 8
"""MLX declares inputs of fewer elements as `constant`."""

_Special = tuple[KernelSource, str, tuple[tuple[str, Scalar], ...], tuple[object, ...]]


class EmulatedLauncher:
    """Runs each launch at once.

    An input named in `in_place` has its new bytes in its own buffer afterwards, where later operations and launches
    find them, as on a GPU. Outputs are full of not-a-numbers before.
    """

    def __init__(self, order: int = Order.UP, seed: int = 0, most_seconds: int = MOST_SECONDS) -> None:
        """Get ready.

        Args:
            order: of threads, see Order. seed: of the shuffled one. most_seconds: of processor time, for a launch.

        Raises:
            NoCompilerError: clang is not installed.
        """
        compiler()
        self._order, self._seed, self._most_seconds = Order(order), seed, most_seconds
        self._machine = Machine()
        self._kernels: dict[_Special, Kernel] = {}

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        """Run; see Launcher.

        Raises:
            KernelError: the kernel did what it must not.
            NotMetalError: its text is not Metal.
            ValueError: an input that is written is not row-major, so that MLX would write a copy.
        """
        mx.eval(launch.inputs)
        kernel = self._kernel(source, launch)
        written = [name in source.in_place for name in source.inputs]
        given = [
            _given(name, array, write) for name, array, write in zip(source.inputs, launch.inputs, written, strict=True)
        ]
        made = [
            Buffer(name, np.full(mx.zeros(shape, dtype).nbytes, FILL, np.uint8), dtype.size, writable=True)
            for name, (shape, dtype) in zip(source.outputs, launch.outputs, strict=True)
        ]
        try:
            kernel.run(
                self._machine,
                [*given, *made],
                launch.grid,
                launch.threadgroup,
                self._order,
                self._seed,
                most_seconds=self._most_seconds,
            )
        except KernelError as fault:
            raise KernelError(f"{source.name}: {fault}") from None
        return [
            mx.array(buffer.content).view(dtype).reshape(shape)
            for buffer, (shape, dtype) in zip(made, launch.outputs, strict=True)
        ]

    def _kernel(self, source: KernelSource, launch: Launch) -> Kernel:
        """Compiled for this specialisation."""
        kinds = tuple((array.dtype, array.size < CONSTANT_BELOW) for array in launch.inputs)
        special = source, source.text, launch.template, (*kinds, *(dtype for _, dtype in launch.outputs))
        if special not in self._kernels:
            metal = capture(source, launch)
            if metal.num_buffers != len(source.inputs) + len(source.outputs):
                raise ValueError(f"{source.name} takes shapes or strides, which the emulator does not pass")
            check(metal)
            self._kernels[special] = compiled(metal)
        return self._kernels[special]


def _given(name: str, array: mx.array, writable: bool) -> Buffer:
    """An input's bytes: its own memory if it is written in place."""
    if writable:
        return Buffer(name, own_bytes(array), array.dtype.size, writable=True)
    return Buffer(name, own_bytes(mx.contiguous(array)), array.dtype.size)


def own_bytes(array: mx.array) -> np.ndarray:
    """uint8, the memory of an array on the CPU itself.

    Raises:
        ValueError: it is not row-major.
    """
    mx.eval(array)
    exporter: Any = array
    view = memoryview(exporter)
    if not view.c_contiguous:
        raise ValueError(f"an array of shape {array.shape} and strides {view.strides} is not row-major")
    return np.frombuffer(view.cast("B"), np.uint8)
