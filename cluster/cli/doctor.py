"""`pomarium doctor`: what about this machine would keep Pomarium from serving, and the cure for each fault.

machine.gather() --Facts--> diagnose(facts) --Findings--> report()
"""

import argparse
import os
import re
from collections.abc import Callable, Iterable

from pomarium.cluster.cli import doctor_mac
from pomarium.cluster.cli.finding import Finding
from pomarium.cluster.cli.machine import PINS, PORT, Facts, gather
from pomarium.worker.settings import VARIABLES

GIB = 2**30
MIN_PYTHON = (3, 11)
MIN_MEMORY = 4 * GIB
MIN_DISK = 5 * GIB
MAX_MACOS_OBJECT_STORE = 2 * GIB

FOREIGN = ("VLLM_", "MLX_")

FASTAPI_LIMIT = (0, 137)
"""FastAPI from this version on breaks vLLM's request parsing."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `doctor` to the command line."""
    parser = subparsers.add_parser(
        "doctor",
        help="check this machine and name the cure for each fault",
        description="Checks versions, memory, disk, folders, port, device, BLAS, embedded model, settings, foreign "
        "variables, other Pomariums, Ray, and on a Mac the version of macOS, Rosetta, the local network, the firewall "
        "and power settings; exits 1 if one of them would keep Pomarium from serving.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print the report: 0, or 1 after a fatal finding."""
    findings = diagnose(gather(os.environ))
    print(report(findings))
    return 1 if any(f.cure and f.fatal for f in findings) else 0


def diagnose(facts: Facts) -> list[Finding]:
    """All findings on `facts`, good and bad."""
    checks: Iterable[Callable[[Facts], list[Finding]]] = (
        _python, _packages, _resources, _folders, _port, _device, _embedded, _settings, _variables, _platform,
        _neighbours, _ray, _macos,
    )  # fmt: skip
    return [finding for check in checks for finding in check(facts)]


def report(findings: Iterable[Finding]) -> str:
    """The findings as text, faults with their cure on a line of their own."""
    lines = []
    for f in findings:
        mark = "ok   " if f.cure is None else "FAULT" if f.fatal else "note "
        lines.append(f"{mark} {f.subject}: {f.state}")
        if f.cure:
            lines.append(f"      -> {f.cure}")
    return "\n".join(lines)


def _python(facts: Facts) -> list[Finding]:
    state = f"{'.'.join(map(str, facts.python))}, {facts.machine}"
    if facts.python[:2] < MIN_PYTHON:
        return [Finding("Python", state, "Install Python 3.11 or newer and run `make install` again.")]
    return [Finding("Python", state)]


def _packages(facts: Facts) -> list[Finding]:
    findings = []
    for name, pinned in PINS.items():
        installed = facts.versions.get(name)
        if installed is None:
            findings.append(Finding(name, "not installed", "Run `make install`."))
        elif _release(installed) != pinned:
            cure = f"Run `make install`: {pinned} is the version that was tested with the others."
            findings.append(Finding(name, installed, cure))
        else:
            findings.append(Finding(name, installed))
    fastapi = facts.versions.get("fastapi")
    if fastapi and tuple(int(n) for n in re.findall(r"\d+", fastapi)[:2]) >= FASTAPI_LIMIT:
        findings.append(Finding("fastapi", fastapi, "Run `make install`: vLLM's endpoint breaks from 0.137 on."))
    mlx, mlx_cpu = facts.versions.get("mlx"), facts.versions.get("mlx-cpu")
    if mlx and mlx_cpu and mlx != mlx_cpu:
        findings.append(Finding("mlx-cpu", mlx_cpu, f"Run `make install`: mlx and mlx-cpu must both be {mlx}."))
    return findings


def _resources(facts: Facts) -> list[Finding]:
    memory = f"{_gib(facts.memory_available)} of {_gib(facts.memory_total)} available"
    disk = f"{_gib(facts.disk_free)} free"
    return [
        Finding("memory", memory)
        if facts.memory_available >= MIN_MEMORY
        else Finding("memory", memory, f"Close programs: serving takes {_gib(MIN_MEMORY)}, with a small model.", False),
        Finding("disk", disk)
        if facts.disk_free >= MIN_DISK
        else Finding("disk", disk, f"Free {_gib(MIN_DISK)}: models and logs go there."),
    ]


def _folders(facts: Facts) -> list[Finding]:
    findings = []
    for kind, (folder, fault) in facts.folders.items():
        variable = f"XDG_{kind.upper()}_HOME"
        cure = f"Set {variable}, or HOME, to a folder that you can write."
        state = folder if fault is None else f"{folder}: {fault}" if folder else "nowhere"
        findings.append(Finding(f"{kind} folder", state, None if fault is None else cure))
    return findings


def _port(facts: Facts) -> list[Finding]:
    if facts.port_free:
        return [Finding(f"port {PORT}", "free")]
    return [Finding(f"port {PORT}", "in use", "Choose another with `pomarium serve --port`.", fatal=False)]


def _device(facts: Facts) -> list[Finding]:
    if facts.device_fault:
        return [Finding("device", "none", facts.device_fault)]
    findings = [Finding("device", facts.device or "unknown")]
    if facts.blas_fault:
        findings.append(Finding("BLAS", "slow", facts.blas_fault, fatal=False))
    elif facts.blas:
        findings.append(Finding("BLAS", facts.blas))
    return findings


def _embedded(facts: Facts) -> list[Finding]:
    if facts.embedded_fault:
        return [Finding("embedded model", "not usable", facts.embedded_fault)]
    return [Finding("embedded model", "present")]


def _settings(facts: Facts) -> list[Finding]:
    if facts.settings_fault:
        return [Finding("settings", "invalid", facts.settings_fault)]
    return [Finding("settings", "valid")]


def _variables(facts: Facts) -> list[Finding]:
    """Those of vLLM and MLX that are none of ours: names only, for values may be secret."""
    ours = {variable.name for variable in VARIABLES}
    foreign = sorted(name for name in facts.environ if name.startswith(FOREIGN) and name not in ours)
    if not foreign:
        return []
    cure = "They change what vLLM or MLX do: unset those that you did not mean."
    return [Finding("variables", ", ".join(foreign), cure, fatal=False)]


def _neighbours(facts: Facts) -> list[Finding]:
    findings = []
    others = facts.neighbours
    if len(others.commands) > 1:
        cure = f"A shell runs {others.commands[0]}: remove the others, or name the one that you mean by its path."
        findings.append(Finding("commands named pomarium", ", ".join(others.commands), cure, fatal=False))
    if len(others.packages) > 1:
        cure = "Python imports the first on its path: uninstall the others, and unset PYTHONPATH."
        findings.append(Finding("installed twice", ", ".join(others.packages), cure, fatal=False))
    if others.serving:
        pids = ", ".join(map(str, others.serving))
        cure = "It holds memory and its port: stop it before you serve another model, or serve both from it."
        findings.append(Finding("another pomarium runs", f"process {pids}", cure, fatal=False))
    return findings


def _platform(facts: Facts) -> list[Finding]:
    return [Finding("vLLM's platform", "not Pomarium's", sentence) for sentence in facts.diversions]


def _ray(facts: Facts) -> list[Finding]:
    findings = []
    address = facts.environ.get("RAY_ADDRESS")
    if address is None:
        findings.append(Finding("Ray", "of its own (RAY_ADDRESS is not set)"))
    elif not facts.ray_reachable:
        cure = "Start the head there, or unset RAY_ADDRESS to serve from this machine alone."
        findings.append(Finding("Ray", f"nothing answers at RAY_ADDRESS={address}", cure))
    else:
        findings.append(Finding("Ray", f"answers at {address}"))
        if "RAY_AUTH_MODE" not in facts.environ:
            cure = "Set RAY_AUTH_MODE to token or disabled on every machine: else some demand a token and some do not."
            findings.append(Finding("RAY_AUTH_MODE", "not set", cure))
    if len(facts.temp_folder) > 20:
        cure = "Set RAY_TMPDIR to at most 20 characters: Ray's socket paths must stay under 103."
        findings.append(Finding("RAY_TMPDIR", facts.temp_folder, cure))
    return findings


def _macos(facts: Facts) -> list[Finding]:
    if facts.system != "Darwin":
        return []
    joins = "RAY_ADDRESS" in facts.environ
    findings = [] if facts.mac is None else doctor_mac.diagnose(facts.mac, joins)
    if facts.machine != "arm64" and not (facts.mac is not None and facts.mac.translated):
        findings.append(
            Finding("machine", facts.machine, "Use a Mac with Apple silicon, and a Python built for arm64.")
        )
    if joins and facts.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "1":
        cure = "Set it to 1 in every process: without it Ray on macOS joins no other machine."
        findings.append(Finding("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "not 1", cure))
    store = facts.environ.get("RAY_OBJECT_STORE_MEMORY", "")
    if store.isdigit() and int(store) > MAX_MACOS_OBJECT_STORE:
        findings.append(Finding("RAY_OBJECT_STORE_MEMORY", store, "Lower it to 2 GiB, Ray's limit here, or unset it."))
    if joins and facts.hostname.endswith(".local") and facts.host_is_loopback:
        cure = "Give the Mac a fixed address and start Ray with --node-ip-address: its own name leads to loopback."
        findings.append(Finding("host name", facts.hostname, cure))
    return findings


def _release(installed: str) -> str:
    return installed.split("+")[0]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
