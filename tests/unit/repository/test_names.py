"""Our folders `proto` and `kernels` hide nobody's packages, and pomarium imports, however Python is started.

proto-plus (through Ray) owns the name `proto`; transformers believes that Hugging Face's `kernels` is installed when a
package of that name can be imported from the repository root.
"""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

import pytest
from wheel_build import build_wheel

ROOT = Path(__file__).parents[3]
SITE_PACKAGES = sysconfig.get_path("purelib")

PROBE = """
import importlib, json, sys

def probe():
    import proto
    from transformers.utils.import_utils import is_kernels_available

    errors = importlib.import_module("pomarium.worker.errors")
    plugin = importlib.import_module("pomarium.cluster.engine.plugin")
    return {
        "proto": proto.__file__,
        "message": proto.Message.__module__,
        "kernels": is_kernels_available(),
        "errors": errors.__file__,
        "plugin": plugin.__file__,
    }

if __name__ == "__main__":
    print(json.dumps(probe()))
"""

RAY_DRIVER = """
import json, os, ray
from names_probe import probe

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80_000_000)
print(json.dumps(ray.get(ray.remote(probe).remote())))
ray.shutdown()
"""


@pytest.fixture
def probe_dir(tmp_path: Path) -> Path:
    (tmp_path / "names_probe.py").write_text(PROBE)
    (tmp_path / "names_driver.py").write_text(RAY_DRIVER)
    return tmp_path


def run(*arguments: str, cwd: Path, path: list[str], **environment: str) -> dict[str, object]:
    """The probe's findings from a fresh interpreter: `arguments` to Python, `path` as PYTHONPATH."""
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def check(found: dict[str, object], source: Path) -> None:
    """No name was hijacked, and pomarium came from `source`."""
    assert str(found["proto"]).startswith(SITE_PACKAGES)
    assert found["message"] == "proto.message"
    assert found["kernels"] is False
    assert str(found["errors"]) == str(source / "worker/errors.py")
    assert str(found["plugin"]) == str(source / "cluster/engine/plugin.py")


def test_module_run_from_the_repository_root(probe_dir: Path) -> None:
    check(run("-m", "names_probe", cwd=ROOT, path=[str(probe_dir)]), ROOT)


def test_started_elsewhere(probe_dir: Path) -> None:
    check(run("names_probe.py", cwd=probe_dir, path=[]), ROOT)


def test_as_a_wheel(probe_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """-S leaves out the editable installation, which .pth files bring in; a pure wheel is installed by unpacking it."""
    installed = probe_dir / "installed"
    with zipfile.ZipFile(build_wheel(tmp_path_factory.getbasetemp())) as wheel:
        wheel.extractall(installed)
    found = run("-S", "-m", "names_probe", cwd=ROOT, path=[str(probe_dir), str(installed), SITE_PACKAGES])
    check(found, installed / "pomarium")


@pytest.mark.e2e
def test_inside_a_ray_worker(probe_dir: Path) -> None:
    """Ray puts the driver's folder, here the repository root, on its workers' path."""
    with tempfile.TemporaryDirectory(prefix="pmr", dir="/tmp") as ray_dir:  # Ray's socket paths must stay short
        found = run(
            "-m", "names_driver", cwd=ROOT, path=[str(probe_dir)],
            RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_TMPDIR=ray_dir,
        )  # fmt: skip
    check(found, ROOT)


def test_the_layers_are_namespace_packages() -> None:
    """An __init__.py would make `import kernels` from the repository root succeed as a package of that name."""
    assert [
        layer for layer in ("cluster", "worker", "kernels", "proto") if (ROOT / layer / "__init__.py").exists()
    ] == []
