"""Our folders `proto` and `kernels` hide nobody's packages, and pomarium imports, however Python is started.

proto-plus (through Ray) owns the name `proto`; transformers believes that Hugging Face's `kernels` is installed when a
package of that name can be imported from the repository root. In a worker of Ray: tests/rack/test_simulated_rack.py.
"""

import zipfile
from pathlib import Path

import pytest
from names_probe_run import SITE_PACKAGES, check, run, write
from wheel_build import build_wheel

ROOT = Path(__file__).parents[3]


@pytest.fixture
def probe_dir(tmp_path: Path) -> Path:
    return write(tmp_path)


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


def test_the_layers_are_namespace_packages() -> None:
    """An __init__.py would make `import kernels` from the repository root succeed as a package of that name."""
    assert [
        layer for layer in ("cluster", "worker", "kernels", "proto") if (ROOT / layer / "__init__.py").exists()
    ] == []
