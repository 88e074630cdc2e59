"""vLLM's Python tree from a source package, by pip's own settings: a small one in the form of vLLM's, a real pip."""

import csv
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from vllm.platforms import current_platform

from pomarium.cluster.endpoint import beforehand
from pomarium.cluster.engine import plugin
from pomarium.cluster.provision import kernels, pure_vllm
from pomarium.worker.errors import UnsupportedError

SCRIPT = Path(pure_vllm.__file__)
PKG_INFO = """\
Metadata-Version: 2.4
Name: vllm
Version: 0.29.0
Requires-Python: >=3.10
Requires-Dist: py_cpuinfo
Requires-Dist: torch==2.13.0
Requires-Dist: flashinfer-python==0.6.18
Requires-Dist: nvidia-cutlass-dsl[cu13]==4.6.2
Provides-Extra: audio
Requires-Dist: soundfile; extra == "audio"

Version: of the text, which is no header
"""
FILES = {
    "PKG-INFO": PKG_INFO,
    "LICENSE": "Apache",
    # As vLLM's: what it would do is fail, in one way or another.
    "pyproject.toml": '[build-system]\nrequires = ["cmake"]\nbuild-backend = "setuptools.build_meta"\n',
    "setup.py": "raise SystemExit('it was built')\n",
    "requirements/common.txt": "py-cpuinfo # a comment\n\n",
    "requirements/cpu.txt": '-r common.txt\ntorch==2.13.0+cpu; platform_machine == "x86_64"\n',
    "vllm.egg-info/entry_points.txt": "[console_scripts]\nvllm = vllm.main:main\n\n[vllm.plugins]\na = vllm.a:b\n",
    "vllm/__init__.py": "",
    "vllm/main.py": "def main():\n    print('served')\n",
    "vllm/configs/a,b.json": "{}",
    "tests/test_a.py": "",
}


def write_package(folder: Path, files: dict[str, str]) -> str:
    """Writes vllm-0.29.0.tar.gz; returns its sha256."""
    folder.mkdir(exist_ok=True)
    path = folder / "vllm-0.29.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"vllm-0.29.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Environment:
    """A fresh virtual environment, and a folder that is all the index there is."""

    folder: Path
    index: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin/python"

    def install(self, sha256: str) -> "subprocess.CompletedProcess[str]":
        pins = self.folder / "pins.txt"
        pins.write_text(f"vllm==0.29.0 --hash=sha256:{sha256}\n")
        environ = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PIP_CONFIG_FILE": os.devnull}
        environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index), "PYTHONPATH": "/nowhere"}
        return subprocess.run(
            [self.python, SCRIPT, pins], env=environ, capture_output=True, text=True, timeout=120, check=False
        )

    def run(self, code: str) -> str:
        return subprocess.run(
            [self.python, "-c", code], capture_output=True, text=True, timeout=60, check=True
        ).stdout.strip()

    def installed(self) -> list[Path]:
        return sorted(self.folder.glob("lib/python3.*/site-packages/vllm*"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("pure")
    venv.create(folder / "venv", with_pip=True)
    return Environment(folder / "venv", folder / "index")


def test_what_does_not_have_the_checksum_is_not_installed(environment: Environment) -> None:
    write_package(environment.index, FILES)
    result = environment.install("0" * 64)
    assert result.returncode == 1
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in result.stderr
    assert environment.installed() == []


def test_a_package_of_another_form_is_one_sentence(environment: Environment) -> None:
    files = {name: text for name, text in FILES.items() if name != "requirements/cpu.txt"}
    result = environment.install(write_package(environment.index, files))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "vllm-0.29.0.tar.gz has no requirements/cpu.txt: it is no vLLM."
    assert environment.installed() == []


def test_the_tree_is_a_distribution_with_all_that_belongs_to_one(environment: Environment) -> None:
    sha256 = write_package(environment.index, FILES)
    for _ in range(2):  # may be repeated
        result = environment.install(sha256)
        assert result.returncode == 0, result.stderr
    tree, info = environment.installed()
    assert sorted(str(path.relative_to(tree)) for path in tree.rglob("*") if "__pycache__" not in path.parts) == [
        "__init__.py", "configs", "configs/a,b.json", "main.py",
    ]  # fmt: skip
    found = json.loads(
        environment.run(
            "import importlib.metadata as m, json\n"
            "d = m.distribution('vllm')\n"
            "points = [[e.group, e.name, e.value] for e in d.entry_points]\n"
            "missing = [str(f) for f in d.files if not f.locate().exists()]\n"
            "print(json.dumps([d.version, d.requires, d.read_text('INSTALLER').strip(), points, missing]))"
        )
    )
    assert found == [
        "0.29.0+cpu.pure",
        ["py_cpuinfo", "torch==2.13.0", 'soundfile; extra == "audio"'],
        "pip",
        [["console_scripts", "vllm", "vllm.main:main"], ["vllm.plugins", "a", "vllm.a:b"]],
        [],
    ]
    assert subprocess.check_output([environment.folder / "bin/vllm"], text=True) == "served\n"
    assert "no header" in (info / "METADATA").read_text()
    assert not (info / "direct_url.json").exists(), "pip freeze would name a folder that is gone"
    assert not list(environment.folder.glob(".cache/pip/wheels/**/*.whl")), "other projects would get it"


def test_the_record_is_true_of_every_file(tmp_path: Path) -> None:
    write_package(tmp_path, FILES)
    wheel = pure_vllm.build_wheel(tmp_path / "vllm-0.29.0.tar.gz", tmp_path)
    assert wheel.name == "vllm-0.29.0+cpu.pure-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        rows = list(csv.reader(io.StringIO(archive.read("vllm-0.29.0+cpu.pure.dist-info/RECORD").decode())))
        assert sorted(row[0] for row in rows) == sorted(archive.namelist())
        assert [row[0] for row in rows if not row[1]] == ["vllm-0.29.0+cpu.pure.dist-info/RECORD"]
        assert all(int(size) == len(archive.read(name)) for name, digest, size in rows if digest)


@pytest.mark.parametrize(
    ("version", "pure"), [("0.29.0+cpu.pure", True), ("0.29.0+cpu", False), ("0.29.0", False), ("0.29.0+pure", False)]
)
def test_which_version_has_no_kernels(version: str, pure: bool) -> None:
    assert pure_vllm.is_pure(version) is pure


def test_vllm_s_own_backend_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `pomarium serve` before anything starts, and by vLLM's own commands, for which our platform stays."""
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    monkeypatch.setattr(kernels, "version", lambda _: "0.29.0+cpu.pure")
    assert plugin.register() == "pomarium.cluster.engine.platform.PomariumPlatform"
    words = r"VLLM_METAL_USE_MLX=0.*vLLM's Python alone.*make vllm-cpu-backend"
    with pytest.raises(UnsupportedError, match=words):
        current_platform.check_and_update_config(None)
    with pytest.raises(UnsupportedError, match=words):
        beforehand.check([], os.environ)


def test_the_script_needs_nothing_but_the_standard_library() -> None:
    """It runs before anything is installed."""
    command = [sys.executable, "-I", "-S", "-c", f"import runpy; runpy.run_path({str(SCRIPT)!r})"]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0
