"""The Metal text that MLX makes of a kernel, without a GPU.

    KernelSource + Launch --metal_kernel, called while mx.export_function traces--> exported file --read--> MetalText

`mx.fast.metal_kernel` writes a function around a body for each template and set of dtypes. It does so when the call is
traced, on any build of MLX, and the exported graph holds the result as an argument of its CustomKernel primitive:
name, text, grid, threadgroup (mlx/export.cpp, mlx/fast_primitives.h).
"""

import struct
import tempfile
from pathlib import Path

import mlx.core as mx
from emulator.translate import MetalText

from pomarium.kernels.launch import KernelSource, Launch, call, metal_kernel

_PRIMITIVE = b"CustomKernel"


def capture(source: KernelSource, launch: Launch) -> MetalText:
    """The text that Metal's compiler would get, behind MLX's own headers.

    Lines are numbered as in the kernel's file.

    Raises:
        RuntimeError: MLX's format of exported graphs is another one.
    """
    kernel = metal_kernel(source)

    def traced(*inputs: mx.array) -> list[mx.array]:
        return call(kernel, Launch(inputs, launch.template, launch.grid, launch.threadgroup, launch.outputs))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.mlxfn"
        mx.export_function(str(path), traced, *launch.inputs)
        name, text, sizes = _read(path.read_bytes())
    if sizes != (*launch.grid, *launch.threadgroup):
        raise RuntimeError(f"the exported graph holds sizes {sizes}, not {launch.grid} and {launch.threadgroup}")
    if text.count(source.text) != 1:
        raise RuntimeError(f"the exported text of {name} does not hold the body of {source.name} once")
    return MetalText(text.replace(source.text, f'\n#line 1 "{source.name}.metal"\n{source.text}'), name)


def _read(exported: bytes) -> tuple[str, str, tuple[int, ...]]:
    """Name, text, and the three sizes each of grid and threadgroup."""
    if exported.count(_PRIMITIVE) != 1:
        raise RuntimeError(f"the exported graph holds {exported.count(_PRIMITIVE)} custom kernels, not 1")
    at = exported.index(_PRIMITIVE) + len(_PRIMITIVE)
    name, at = _string(exported, at)
    text, at = _string(exported, at)
    return name, text, struct.unpack_from("<6i", exported, at)


def _string(exported: bytes, at: int) -> tuple[str, int]:
    """A length of 8 bytes and so many characters; and the place behind them."""
    (length,) = struct.unpack_from("<Q", exported, at)
    start = at + 8
    if start + length > len(exported):
        raise RuntimeError(f"a string of {length} bytes does not fit an exported graph of {len(exported)}")
    return exported[start : start + length].decode(), start + length
