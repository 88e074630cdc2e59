"""Compiles translated kernels with clang, and keeps what it has compiled.

    C++ --shared_object--> path of a shared object        C++ --accepts--> the front end's messages

Results are kept under $XDG_CACHE_HOME (or ~/.cache), named by all they depend on: text, headers, compiler and flags.
$POMARIUM_CLANG names the compiler instead of clang++-19; it needs clang's _Float16 and __bf16 (18 or newer).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HEADERS = Path(__file__).resolve().parent / "msl"

_INCLUDES = ("-std=c++17", "-isystem", str(HEADERS), "-isystem", str(HEADERS / "include"))

_RUN_FLAGS = (
    *_INCLUDES,
    "-O1",
    "-fno-finite-loops",
    "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-Xclang",
    "-ffloat16-excess-precision=none",
    "-Xclang",
    "-fbfloat16-excess-precision=none",
    # What is not initialised is a not-a-number or a far-off index.
    "-ftrivial-auto-var-init=pattern",
    "-fsanitize=alignment,bounds,integer-divide-by-zero,shift,signed-integer-overflow",
    "-fsanitize-trap=all",
    # Announces accesses of memory to msl/access.h, which knows them by sizes of up to 16 bytes.
    "-fsanitize=thread",
    "-mllvm",
    "-tsan-instrument-func-entry-exit=0",
    "-fno-vectorize",
    "-fno-slp-vectorize",
    "-Wno-everything",
    "-Werror=return-type",
)

_CHECK_FLAGS = (
    *_INCLUDES,
    "-fsyntax-only",
    "-Wall",
    "-Wconditional-uninitialized",
    "-Wconversion",
    "-Wshadow",
    "-Wno-sign-conversion",
    "-Wno-implicit-int-float-conversion",
    "-Wno-unused",
    "-Wno-duplicate-decl-specifier",
    "-Wno-missing-braces",
    "-ferror-limit=5",
)


class NoCompilerError(RuntimeError):
    """clang is not installed."""


class CompileError(RuntimeError):
    """The text is no C++ for clang."""


@cache
def compiler() -> str:
    """Path of clang.

    Raises:
        NoCompilerError: there is none.
    """
    name = os.environ.get("POMARIUM_CLANG", "clang++-19")
    found = shutil.which(name)
    if found is None:
        raise NoCompilerError(f"there is no {name}: install clang 18 or newer, and name it in POMARIUM_CLANG")
    return found


def shared_object(text: str) -> Path:
    """Compile, if that has not happened yet.

    Raises:
        CompileError: with clang's messages.
    """
    path = _folder() / f"{_digest(text, _RUN_FLAGS)}.so"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            compiled, made = Path(folder) / "kernel.o", Path(folder) / "kernel.so"
            messages = _clang(("-x", "c++", "-", *_RUN_FLAGS, "-c", "-o", str(compiled)), text)
            if not compiled.exists():
                raise CompileError(messages)
            # Linked without the flags: a shared object of macOS would else need the sanitizers' own run-time library,
            # which ends a process that loads it late.
            messages = _clang(("-shared", str(compiled), "-o", str(made)))
            if not made.exists():
                raise CompileError(messages)
            made.replace(path)
    return path


def messages(text: str) -> str:
    """Errors and warnings of the front end; empty if there are none."""
    path = _folder() / f"{_digest(text, _CHECK_FLAGS)}.txt"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            made = Path(folder) / "messages.txt"
            made.write_text(_clang(("-x", "c++", "-", *_CHECK_FLAGS), text))
            made.replace(path)
    return path.read_text()


def _clang(arguments: tuple[str, ...], text: str = "") -> str:
    """Run it, with `text` as its standard input; what it says."""
    command = [compiler(), *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=False).stderr


@cache
def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "pomarium" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _surroundings() -> str:
    """What results depend on besides text and flags: headers, compiler, and the processor that -march=native means."""
    headers = "".join(path.read_text() for path in sorted(HEADERS.rglob("*")) if path.is_file())
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return headers + version + processor


def _digest(text: str, flags: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join((text, *flags, _surroundings())).encode()).hexdigest()[:24]
