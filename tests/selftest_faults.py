"""Faults of a machine for `pomarium selftest`, put into all its processes: `sitecustomize` of a folder on PYTHONPATH.

    preload(folder, "compile_error") --PYTHONPATH--> every process: inject() before its own modules run

The GPU is the emulator; the compile error is clang's, the wrong results are a kernel's, the aborts are aborts.
"""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import mlx.core as mx

from pomarium.cluster.selftest import sections
from pomarium.kernels import check, launch
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import KernelSource, Launch, Launcher
from pomarium.kernels.timing import Sizes
from pomarium.worker import selftest_kernels
from pomarium.worker.selftest_rows import Begin, Event, fact

SMALL = Sizes(4, 2, 64, 2, 32, 16, 8, 2, 2, 16, 1 << 10)
CASES = ("cache writes, bfloat16", "cache writes, float32, 5 heads")
ALL_CASES, READ, DEVICE_INFO = check.all_cases, launch._read, mx.device_info

WRONG = ("k_pool[to * KC + i] = k_pool[from * KC + i];", "k_pool[to * KC + i] = k_pool[from * KC + i / 2];")
NOT_METAL = ("constexpr int KC = KN / W;", "constexpr int KC = KN / W_THERE_IS_NOT;")


def preload(folder: Path, fault: str) -> dict[str, str]:
    """Variables of a process in which, and in all that it starts, `fault` is there."""
    (folder / "sitecustomize.py").write_text(f"import selftest_faults\nselftest_faults.{fault}()\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(Path(__file__).parent)])}


def emulated_gpu(wrap: type["_Wrapped"] | None = None) -> None:
    """Kernels run on the emulator: a few cases and small sizes."""
    from emulator.launcher import EmulatedLauncher

    def launchers() -> selftest_kernels.Launchers:
        emulator = EmulatedLauncher()
        used: Launcher = emulator if wrap is None else wrap(emulator)
        return selftest_kernels.Launchers(used, emulator)

    selftest_kernels.gpu_launchers = launchers
    selftest_kernels.this_gpu = lambda: Gpu(Family.APPLE, 1)
    selftest_kernels.timed = partial(selftest_kernels.timed, sizes=SMALL, rounds=1)
    check.all_cases = lambda seed=0: (case for case in ALL_CASES(seed) if case.name.startswith(CASES))


def compile_error() -> None:
    """copy_blocks is not Metal."""
    emulated_gpu()
    _replace(*NOT_METAL)


def wrong_kernel() -> None:
    """copy_blocks copies wrong elements."""
    emulated_gpu()
    _replace(*WRONG)


def abort() -> None:
    """A driver that ends the process at copy_blocks, as an Objective-C exception does, and times nothing."""
    emulated_gpu(_Aborting)
    selftest_kernels.timed = partial(selftest_kernels.timed, rounds=0)


def hang() -> None:
    """The section of times never comes to an end."""
    sections.SECTIONS[sections.TIME] = lambda done, given: _hanging()


def no_metal() -> None:
    """MLX built with Metal on a machine that has no Metal device."""

    def device_info(device: mx.Device = mx.Device(mx.cpu, 0)) -> object:  # noqa: B008 - a fixed device
        if device == mx.Device(mx.gpu, 0):
            raise RuntimeError("[metal::load_device] No Metal device available.")
        return DEVICE_INFO(device)

    mx.metal.is_available = lambda: True
    mx.device_info = device_info


def aborting_metal() -> None:
    """A Metal that ends the process that asks for a device, as MLX did before 0.31 where there is none."""

    def device_info(device: object = None) -> object:
        os.write(2, b"NSRangeException: index 0 beyond bounds for empty array\n")
        os.abort()

    mx.metal.is_available = lambda: True
    mx.device_info = device_info


def _replace(before: str, after: str) -> None:
    def read(name: str) -> str:
        text = READ(name)
        if name == "metal/copy_blocks.metal":
            assert before in text
            return text.replace(before, after)
        return text

    launch._read = read


class _Wrapped:
    """A launcher that does something else for copy_blocks."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        if source.name == "copy_blocks":
            self.instead()
        return self._launcher.launch(source, launch)

    def instead(self) -> None:
        raise NotImplementedError


class _Aborting(_Wrapped):
    def instead(self) -> None:
        os.write(2, b"terminating due to uncaught exception of type NSException\n")
        os.abort()


def _hanging() -> Iterator[Event]:
    yield fact("a row", "before")
    yield Begin("a kernel")
    while True:
        signal.pause()
