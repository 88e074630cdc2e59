"""What this machine brings to a rack: memory, chip, bandwidth and FLOP/s, as labels will tell it.

macOS: sysctl, system_profiler --mac_hardware--> Hardware --+
elsewhere: /proc/cpuinfo, psutil -----------------> Hardware --+--facts--> MacFacts
worker.memory: what workers would take as their base ---------+
rack.yaml, options: Known (comes first) ----------------------+
chips.py (Apple's chips), or measured here (speed.py), for a chip that is not in the table
"""

import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from pomarium.cluster.machine import chips, speed
from pomarium.cluster.machine.speed import Speed
from pomarium.cluster.machine.units import format_size
from pomarium.cluster.machine.version import own_version
from pomarium.cluster.rack.inventory import Inventory, MacEntry
from pomarium.cluster.rack.labels import LONGEST, MacFacts, check_name
from pomarium.cluster.rack.placement_inputs import REACHED_BANDWIDTH, REACHED_FLOPS, cpu_model_memory
from pomarium.worker.errors import SettingsError

COMMAND_S = 20.0
"""system_profiler takes a second, and several on a busy Mac."""


@dataclass(frozen=True)
class Hardware:
    """chip: as the system calls it. gpu_cores: None where nothing tells. memory: bytes."""

    chip: str
    gpu_cores: int | None
    memory: int


@dataclass(frozen=True)
class Known:
    """What the user says; None is to be found out. memory_limit: bytes that workers may take for the machine's."""

    name: str | None = None
    chip: str | None = None
    gpu_cores: int | None = None
    model_memory: int | None = None
    memory_limit: int | None = None
    bandwidth: float | None = None
    flops: float | None = None


def known_of(inventory: Inventory, name: str, address: str) -> MacEntry:
    """This machine's entry of rack.yaml, by name or else by address. Raises SettingsError if it has none."""
    for entry in (*(m for m in inventory.macs if m.name == name), *(m for m in inventory.macs if m.address == address)):
        return entry
    raise SettingsError(
        f"The rack file has no Mac called {name!r} and none with the address {address}: add it, or name one of "
        f"{', '.join(mac.name for mac in inventory.macs)} with --name."
    )


def merged(known: Known, entry: MacEntry) -> Known:
    """What the user said on the command line, and for the rest what rack.yaml says."""
    return Known(
        entry.name,
        known.chip or entry.chip,
        known.gpu_cores or entry.gpu_cores,
        known.model_memory or entry.model_memory,
        known.memory_limit,
        known.bandwidth or entry.bandwidth,
        known.flops or entry.flops,
    )


def sentence(facts: MacFacts) -> str:
    """One line for people."""
    return (
        f"{facts.name}: {facts.chip}, {format_size(facts.memory)}, of which models may take "
        f"{format_size(facts.model_memory)}; {facts.bandwidth / 1e9:.3g} GB/s, {facts.flops / 1e12:.3g} TFLOPS"
    )


def own_name(hostname: str) -> str:
    """A Mac's name from its host name: the first part, without what a name cannot hold. Raises SettingsError."""
    kept = re.sub(r"[^A-Za-z0-9._-]", "-", hostname.split(".")[0])[:LONGEST].strip("-._")
    if not kept:
        raise SettingsError(f"The host name {hostname!r} gives no name for this Mac: choose one with --name.")
    return check_name(kept)


def gather(known: Known, name: str, environ: Mapping[str, str]) -> MacFacts:
    """The facts of this machine. Takes up to a second, the first time with a new chip a few. Raises SettingsError."""
    from pomarium.worker import device, settings

    hardware = _mac_hardware() if platform.system() == "Darwin" else _other_hardware()
    values = settings.load(environ)
    where = device.detect(values)
    measured = None
    if is_to_be_measured(known, hardware):
        on_gpu = where.kind is settings.DeviceKind.GPU
        measured = speed.of_gpu(hardware.chip, environ) if on_gpu else speed.of_processor()
    return facts(known, name, hardware, model_memory(known.memory_limit, environ), measured)


def is_to_be_measured(known: Known, hardware: Hardware) -> bool:
    """Whether neither the user nor the table of Apple's chips has both figures; what the user names has to be in it."""
    if known.bandwidth is not None and known.flops is not None:
        return False
    if not chips.is_apple(known.chip or hardware.chip):
        return True
    named = known.chip is not None or known.gpu_cores is not None
    return not named and not chips.is_known(hardware.chip, hardware.gpu_cores)


def facts(known: Known, name: str, hardware: Hardware, model_memory: int, measured: Speed | None) -> MacFacts:
    """Puts together what is known and what was found.

    Args:
        measured: of a chip that is not in the table; may be None if both speeds are known.

    Raises:
        SettingsError: the chip is not in the table, and nothing was measured.
    """
    chip = known.chip or hardware.chip
    bandwidth, flops = known.bandwidth, known.flops
    if measured is not None:
        bandwidth, flops = bandwidth or measured.bandwidth, flops or measured.flops
    if bandwidth is None or flops is None:
        found = chips.identify(chip, known.gpu_cores or hardware.gpu_cores)
        chip = found.name
        bandwidth = bandwidth or found.bandwidth * REACHED_BANDWIDTH
        flops = flops or found.flops * REACHED_FLOPS
    memory = min(hardware.memory, known.memory_limit or hardware.memory)
    return MacFacts(name, chip, memory, known.model_memory or model_memory, bandwidth, flops, own_version())


def mac_hardware(sysctl: str, displays: str) -> Hardware:
    """What macOS tells.

    Args:
        sysctl: of `sysctl machdep.cpu.brand_string hw.memsize`.
        displays: of `system_profiler -json SPDisplaysDataType`.

    Raises:
        SettingsError: chip or memory are not in it.
    """
    values = dict(line.split(": ", 1) for line in sysctl.splitlines() if ": " in line)
    chip, memory = values.get("machdep.cpu.brand_string", "").strip(), _count(values.get("hw.memsize", ""))
    if not chip or memory is None:
        raise SettingsError(
            "macOS does not tell this Mac's chip and memory (`sysctl machdep.cpu.brand_string hw.memsize`): describe "
            "it in a rack.yaml and name that with --rack."
        )
    return Hardware(chip, _gpu_cores(displays), memory)


def _gpu_cores(displays: str) -> int | None:
    """Of the first display controller that tells; None if none does: a virtual Mac's has no cores."""
    try:
        report = json.loads(displays)
    except (ValueError, RecursionError):
        return None
    gpus = report.get("SPDisplaysDataType") if isinstance(report, dict) else None
    if not isinstance(gpus, list):
        return None
    counts = [_count(str(gpu.get("sppci_cores", ""))) for gpu in gpus if isinstance(gpu, dict)]
    return next((count for count in counts if count is not None), None)


def _count(text: str) -> int | None:
    """A positive decimal number of a plausible length; None for anything else."""
    match = re.fullmatch(r"\s*([0-9]{1,18})\s*", text)
    return int(match[1]) or None if match else None


def cpu_name(cpuinfo: str) -> str | None:
    """The processor's name in Linux' /proc/cpuinfo; None where it has none (many Arm machines)."""
    match = re.search(r"^model name\s*:\s*(.+?)\s*$", cpuinfo, re.MULTILINE)
    return match[1] if match else None


def model_memory(limit: int | None, environ: Mapping[str, str]) -> int:
    """What the workers of this machine together would take as their share (worker.memory)."""
    from pomarium.worker import device, memory, settings

    values = settings.load(environ)
    where = device.detect(values)
    confined = {} if limit is None else {settings.MACHINE_MEMORY: str(limit)}
    found = memory.snapshot(where, confined)
    base, most = memory.memory_base(where, found), max(1, found.total - found.reserve)
    if where.kind is settings.DeviceKind.CPU:
        return min(cpu_model_memory(base, values.resolved_fraction), most)
    return min(int(base * values.resolved_fraction), most)


def _mac_hardware() -> Hardware:
    sysctl = _output("sysctl", "machdep.cpu.brand_string", "hw.memsize")
    return mac_hardware(sysctl, _output("system_profiler", "-json", "SPDisplaysDataType"))


def _other_hardware() -> Hardware:
    path = Path("/proc/cpuinfo")
    name = cpu_name(path.read_text(errors="replace")) if path.is_file() else None
    return Hardware(name or platform.machine() or "unknown", None, int(psutil.virtual_memory().total))


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(
            f"`{' '.join(command)}` does not answer ({error}): describe this Mac in a rack.yaml and give --rack."
        ) from error
