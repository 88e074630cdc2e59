"""Every kernel's text compiles for CUDA, as MLX's CUDA backend would hand it to NVRTC.

    kernels/cases/*.py --_Recorder, a Launcher that computes nothing--> specialisations
        --generated, what mlx/backend/cuda/custom_kernel.cpp writes around a body--> text --NVRTC, sm_90--> machine code

The compiler and CUDA's headers are packages of the development requirements on Linux; no GPU is needed. MLX's own
utils.cuh is inside its CUDA library, not in its CPU package: UTILS stands in with what the generated text takes of it,
CUDA's types. Runs on a GPU are benchmarks/kernels_gpu.py's.
"""

import ctypes
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import mlx.core as mx
import pytest

from pomarium.kernels.check import all_cases
from pomarium.kernels.launch import FOLDER, KernelSource, Launch, Scalar, cuda_body, cuda_header

COMPILER, RUNTIME, STANDARD_LIBRARY = "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "nvidia-cuda-cccl"

UTILS_NAME = "mlx/backend/cuda/device/utils.cuh"
UTILS = "".join(f"#include <{name}>\n" for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda/std/array", "cuda/std/limits"))

TYPES = {
    mx.float32: "float",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.int32: "int32_t",
}
"""mlx/backend/cuda/utils.cpp, dtype_to_cuda_type."""


@dataclass(frozen=True)
class Special:
    """What MLX compiles once: a kernel with its template and the dtypes of its arrays."""

    source: KernelSource
    template: tuple[tuple[str, Scalar], ...]
    inputs: tuple[mx.Dtype, ...]
    outputs: tuple[mx.Dtype, ...]

    @property
    def dtype(self) -> str:
        """Of the template's T."""
        return str(dict(self.template)["T"]).removeprefix("mlx.core.") if "T" in dict(self.template) else "-"


class _Recorder:
    """Launcher that notes specialisations; its outputs are zeros."""

    def __init__(self) -> None:
        self.specials: list[Special] = []

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        inputs, outputs = (array.dtype for array in launch.inputs), (dtype for _, dtype in launch.outputs)
        self.specials.append(Special(source, launch.template, tuple(inputs), tuple(outputs)))
        return [mx.zeros(shape, dtype) for shape, dtype in launch.outputs]


@cache
def specials() -> dict[str, Special]:
    """One per kernel and dtype, by name: the first in the cases."""
    recorder = _Recorder()
    for case in all_cases():
        case.run(recorder)
    chosen: dict[str, Special] = {}
    for special in recorder.specials:
        chosen.setdefault(f"{special.source.name} {special.dtype}", special)
    return chosen


def generated(special: Special) -> str:
    """The text that MLX 0.32 makes of a cuda_kernel (mlx/backend/cuda/custom_kernel.cpp, build_kernel)."""
    source = special.source
    arguments = [f"const {TYPES[d]}* {n}" for n, d in zip(source.inputs, special.inputs, strict=True)]
    arguments += [f"{TYPES[d]}* {n}" for n, d in zip(source.outputs, special.outputs, strict=True)]
    constants = [_constant(name, value) for name, value in special.template]
    return "\n".join(
        [
            f'#include "{UTILS_NAME}"',
            "#include <cooperative_groups.h>",
            "#define inf cuda::std::numeric_limits<float>::infinity()",
            cuda_header(),
            "namespace mlx::core::cu {",
            "namespace cg = cooperative_groups;",
            f"__global__ void {source.name}({', '.join(arguments)}) {{",
            *constants,
            cuda_body(source.text),
            "}",
            "} // namespace mlx::core::cu",
        ]
    )


def _constant(name: str, value: Scalar) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {TYPES[value]};"
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};"
    return f"  constexpr int {name} = {value};"


class Nvrtc:
    """NVIDIA's runtime compiler, from its Python packages."""

    def __init__(self) -> None:
        """Raises PackageNotFoundError where a package is not installed, OSError where the library does not load."""
        self._library = ctypes.CDLL(str(_located(COMPILER, r"libnvrtc\.so\.\d+$")))
        folders = (
            _located(RUNTIME, r"/cuda_fp16\.h$").parent,
            _located(STANDARD_LIBRARY, r"/cuda/std/array$").parents[2],
        )
        self._options = [
            "--device-as-default-execution-space",
            "--gpu-architecture=sm_90a",
            # Headers are read once: without it they take most of the time.
            "--pch",
            *(f"--include-path={folder}" for folder in folders),
        ]

    def compile(self, text: str) -> str:
        """PTX on the way to machine code for an H100, which is made too, with the options that MLX passes and --pch.

        Raises:
            ValueError: the compiler's messages.
        """
        program = ctypes.c_void_p()
        headers, names = (ctypes.c_char_p * 1)(UTILS.encode()), (ctypes.c_char_p * 1)(UTILS_NAME.encode())
        self._do("CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 1, headers, names)
        options = (ctypes.c_char_p * len(self._options))(*(option.encode() for option in self._options))
        status = self._library.nvrtcCompileProgram(program, len(options), options)
        if status:
            raise ValueError(self._read(program, "ProgramLog").decode())
        code = self._read(program, "PTX").decode()
        self._do("DestroyProgram", ctypes.byref(program))
        return code

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._do(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._do(f"Get{what}", program, buffer)
        return buffer.raw

    def _do(self, name: str, *arguments: object) -> None:
        function: Callable[..., int] = self._library[f"nvrtc{name}"]
        if status := function(*arguments):
            raise RuntimeError(f"nvrtc{name} returned {status}")


def _located(package: str, pattern: str) -> Path:
    for file in files(package) or []:
        if re.search(pattern, str(file)):
            return Path(str(file.locate()))
    raise FileNotFoundError(f"{package} holds no {pattern}")


@pytest.fixture(scope="module")
def nvrtc() -> Nvrtc:
    try:
        return Nvrtc()
    except PackageNotFoundError as error:
        if os.environ.get("CI") and sys.platform == "linux":
            raise
        pytest.skip(f"NVIDIA's compiler is not installed (requirements/dev.txt, on Linux): {error}")


NAMES = tuple(specials())


def test_every_kernel_is_in_the_cases() -> None:
    """A body that no case launches is compiled and checked nowhere."""
    bodies = {path.stem for path in (FOLDER / "metal").glob("*.metal")}
    assert {special.source.name for special in specials().values()} == bodies


@pytest.mark.parametrize("name", NAMES)
def test_compiles(name: str, nvrtc: Nvrtc) -> None:
    special = specials()[name]
    code = nvrtc.compile(generated(special))
    assert special.source.name in code
    if "uint4*" in special.source.text:
        assert re.search(r"ld\.global(\.\w+)*\.v4", code), "16 bytes are not loaded at once"


def test_no_declaration_of_threadgroup_memory_escapes() -> None:
    """What cuda_body does not rewrite would become a variable of each thread, and compile."""
    declaration = re.compile(r"\bthreadgroup\s+\w+\s+\w+\s*(\[|;)")
    for path in (FOLDER / "metal").glob("*.metal"):
        assert not declaration.search(cuda_body(path.read_text())), path.name


def test_an_unknown_word_is_found(nvrtc: Nvrtc) -> None:
    text = generated(specials()[NAMES[0]])
    end = "}\n} // namespace mlx::core::cu"
    assert end in text
    with pytest.raises(ValueError, match="simd_unheard_of"):
        nvrtc.compile(text.replace(end, f"simd_unheard_of(1);\n{end}"))
