"""The layer rule holds, and each of its contracts turns red when it is broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LAYERS = ("cluster", "worker", "kernels", "proto")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the four layers under their installed name."""
    for layer in LAYERS:
        (tmp_path / "pomarium" / layer).mkdir(parents=True)
        if (ROOT / layer).is_dir():
            shutil.copytree(ROOT / layer, tmp_path / "pomarium" / layer, dirs_exist_ok=True)
    return tmp_path


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    command = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); from importlinter.cli import lint_imports_command as l; l()"
    )
    arguments = [str(tree), "--no-cache", "--no-logo", "--config", str(ROOT / "pyproject.toml")]
    return subprocess.run(
        [sys.executable, "-c", command, *arguments], cwd=tree, capture_output=True, text=True, timeout=60
    )


def test_layers_hold(tree: Path) -> None:
    result = lint(tree)
    assert result.returncode == 0, result.stdout + result.stderr


BREACHES = {
    "worker/breach_up.py": "from pomarium.cluster.engine import plugin",
    "worker/breach_ray.py": "import ray.serve",
    "worker/vllm_breach.py": "from vllm.v1.outputs import ModelRunnerOutput",
    "worker/models/breach_vllm.py": "from vllm.config import VllmConfig",
    "kernels/breach_up.py": "from pomarium.worker import errors",
    "kernels/breach_vllm.py": "import vllm",
    "kernels/breach_ray.py": "from ray import remote",
    "proto/breach_up.py": "from pomarium.worker import errors",
    "cluster/rack/breach_up.py": "from pomarium.cluster.executor import team",
    "cluster/machine/breach_up.py": "from pomarium.cluster import faults",
    "cluster/selftest/breach_beside.py": "from pomarium.cluster.endpoint import app",
}


def test_planted_breaches_are_seen(tree: Path) -> None:
    """Each breach is named, and every contract turns red."""
    for module, statement in BREACHES.items():
        planted = tree / "pomarium" / module
        planted.parent.mkdir(exist_ok=True)
        planted.write_text(statement + "\n")
    result = lint(tree)
    assert result.returncode == 1, result.stdout + result.stderr
    for module in BREACHES:
        name = "pomarium." + module.removesuffix(".py").replace("/", ".")
        assert f"{name} -> " in result.stdout, f"{name} passed: {result.stdout}"
    assert "0 kept" in result.stdout


def test_three_modules_of_worker_may_import_vllm(tree: Path) -> None:
    for module in ("metal_worker", "vllm_translation", "vllm_logits_processors"):
        (tree / f"pomarium/worker/{module}.py").write_text("from vllm.v1.worker.worker_base import WorkerBase\n")
    result = lint(tree)
    assert result.returncode == 0, result.stdout + result.stderr
