"""Builds pomarium's wheel out of a copy, so that the working tree stays as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("cluster", "worker", "kernels", "proto", "requirements")
"""What is installed as a package."""


def build_wheel(scratch: Path) -> Path:
    """Path of the wheel of the working tree, built under `scratch` once, by the installed setuptools."""
    source, out = scratch / "pomarium-source", scratch / "pomarium-wheel"
    if not out.exists():
        source.mkdir()
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, source)
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
        out.mkdir()
        command = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
        subprocess.run([sys.executable, "-c", command, out], cwd=source, check=True, timeout=120, capture_output=True)
    (wheel,) = out.glob("pomarium-*.whl")
    return wheel
