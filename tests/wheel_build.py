"""Copies of the working tree, and pomarium's wheel out of one, so that the tree itself stays as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "worker", "kernels", "proto", "requirements")
"""What is installed as a package, each by its link in src/pomarium."""


def copy_tree(target: Path) -> None:
    """Copies what an installation is made of below `target`."""
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "src", target / "src", symlinks=True, ignore=shutil.ignore_patterns("*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)


def build_wheel(scratch: Path) -> Path:
    """Path of the wheel of the working tree, built under `scratch` once, by the installed setuptools."""
    source, out = scratch / "pomarium-source", scratch / "pomarium-wheel"
    if not out.exists():
        copy_tree(source)
        out.mkdir()
        command = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
        subprocess.run([sys.executable, "-c", command, out], cwd=source, check=True, timeout=120, capture_output=True)
    (wheel,) = out.glob("pomarium-*.whl")
    return wheel
