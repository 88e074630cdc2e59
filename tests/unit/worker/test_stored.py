"""The models in this machine's caches: which there are, how much they take, what removing them deletes."""

import json
from pathlib import Path

import huggingface_hub.constants
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx_lm.utils import DEFAULT_ALLOW_PATTERNS
from tiny_gguf import write_gguf
from tiny_models import write_checkpoint

from pomarium.worker.models import hub, stored
from pomarium.worker.models.resolve import resolve
from pomarium.worker.models.stored import Cache

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def on_hugging_face(name: str, hub_folder: Path) -> Path:
    """A cached model, its files links to blobs as the Hub's library leaves them."""
    root = hub_folder / f"models--{name.replace('/', '--')}"
    snapshot, blobs = root / "snapshots" / COMMIT, root / "blobs"
    write_checkpoint("llama_untied", snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_the_files_fetched_are_those_that_mlx_lm_reads() -> None:
    assert list(hub.PATTERNS) == DEFAULT_ALLOW_PATTERNS


def test_nothing_is_there() -> None:
    assert stored.stored() == []


def test_each_cache_has_its_models(tmp_path: Path) -> None:
    snapshot = on_hugging_face("org/model-1.5", tmp_path / "hub")
    write_checkpoint("llama_untied", tmp_path / "scope" / "models" / "org" / "model-2___5")
    write_gguf("llama", tmp_path / "tiny.gguf", Kind.Q4_0)
    folder = resolve(str(tmp_path / "tiny.gguf"))
    found = stored.stored(tmp_path / "scope")
    assert [(model.name, model.cache) for model in found] == [
        (str(folder), Cache.CONVERTED),
        ("org/model-1.5", Cache.HUGGING_FACE),
        ("org/model-2.5", Cache.MODELSCOPE),
    ]
    assert found[1].folder == snapshot
    assert all(model.whole for model in found)
    sizes = [sum(file.stat().st_size for file in model.folder.iterdir()) for model in found]
    assert [model.size for model in found] == [sizes[0], sizes[1] + len(COMMIT), sizes[2]]


def test_modelscopes_usual_folder(tmp_path: Path) -> None:
    write_checkpoint("llama_untied", tmp_path / ".cache" / "modelscope" / "hub" / "org" / "model")
    assert [model.name for model in stored.stored()] == ["org/model"]


def test_what_was_interrupted_is_not_whole(tmp_path: Path) -> None:
    snapshot = on_hugging_face("org/model", tmp_path / "hub")
    (snapshot / "model.safetensors").unlink()
    assert [model.whole for model in stored.stored()] == [False]
    (snapshot / "model-00001-of-00002.safetensors").write_bytes(b"")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [model.whole for model in stored.stored()] == [False]
    (snapshot / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert [model.whole for model in stored.stored()] == [True]
    (snapshot / "model.safetensors.index.json").write_text("{")
    assert [model.whole for model in stored.stored()] == [False]


def test_an_index_of_other_files_beside_a_whole_model(tmp_path: Path) -> None:
    folder = write_checkpoint("llama_untied", tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "consolidated.safetensors"}}))
    assert hub.is_whole(folder)


def test_a_removed_model_is_gone_and_no_other(tmp_path: Path) -> None:
    on_hugging_face("org/one", tmp_path / "hub")
    on_hugging_face("org/two", tmp_path / "hub")
    stored.remove(stored.stored()[0])
    assert [model.name for model in stored.stored()] == ["org/two"]
    assert not (tmp_path / "hub" / "models--org--one").exists()
