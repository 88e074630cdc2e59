"""What a user types becomes a directory, or one sentence that lists what is accepted."""

import re
import socket
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest
from gguf import GGMLQuantizationType as Kind
from hub_stub import Hub, serving
from tiny_gguf import write_gguf
from tiny_models import write_checkpoint

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.checkpoint import inspect
from pomarium.worker.models.look_up import EMBEDDED, local, look_up
from pomarium.worker.models.resolve import resolve


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint("llama_untied", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert resolve("model") == tmp_path / "model"
    assert resolve(str(tmp_path / "model")) == tmp_path / "model"


def test_a_gguf_file_is_converted_once(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf("llama", file, Kind.Q4_0)
    first = resolve(str(file))
    assert inspect(first).model_type == "llama"
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(file)) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    file.unlink()
    write_gguf("llama", file, Kind.Q8_0)
    assert resolve(str(file)) != first


def test_a_linked_gguf_file_is_cached_under_its_own_name(tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / ("0f" * 32), Kind.Q4_0)
    (tmp_path / "tiny.GGUF").symlink_to(tmp_path / ("0f" * 32))
    assert resolve(str(tmp_path / "tiny.GGUF")).name.startswith("tiny-")


@pytest.mark.parametrize("name", ["a" * 5000, "/models/caf\udce9", "\udce9", "a\0b"])
def test_what_no_file_can_be_called(name: str) -> None:
    with pytest.raises(CheckpointError, match="organisation/name, or smollm2"):
        resolve(name)


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(CheckpointError, match="truncated"):
        resolve(str(tmp_path / "bad.gguf"))
    assert [p for p in (tmp_path / "cache" / "pomarium" / "gguf").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("name", ["no-such-model", "", "a b/c", "/no/such/folder", "a/b/c", "../up"])
def test_unknown_names_list_what_is_accepted(name: str) -> None:
    for find in (resolve, look_up):
        with pytest.raises(CheckpointError, match="organisation/name, or smollm2"):
            find(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("my-modle", "my-model"),
        ("./my-modle", "my-model"),
        ("models/lama-8b", "models/llama-8b"),
        ("models/tiny.gguf", "models/tinyy.gguf"),
        ("smolm2", "smollm2"),
    ],
)
def test_what_looks_like_a_mistyped_model_is_told_so(
    name: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for folder in ("my-model", "models/llama-8b"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    (tmp_path / "my-modles").mkdir()  # no model
    (tmp_path / "models" / "tinyy.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"\(did you mean {re.escape(meant)}\?\)"):
        look_up(name)


def test_what_is_on_this_machine_is_found_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    write_checkpoint("llama_untied", tmp_path / "model")
    (tmp_path / "x.GGUF").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    assert look_up(str(tmp_path / "model")) == tmp_path / "model" / "config.json"
    assert look_up(str(tmp_path / "x.GGUF")) is None
    assert [look_up(name) for name in (None, *EMBEDDED)] == [None] * 3
    assert local("organisation/name") is None
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        look_up(str(tmp_path / "empty"))


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(CheckpointError, match=r"no \.gguf file"):
        resolve(str(tmp_path / "weights.bin"))
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve(str(tmp_path / "absent.gguf"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(write_checkpoint("llama_untied", tmp_path / "remote")) as found:
        template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", found.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield found


def test_an_id_is_downloaded_from_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = resolve("tiny/model")
    assert inspect(directory).model_type == "llama"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert resolve("tiny/model") == directory
    assert hub.requests == []


def test_an_id_that_the_hub_does_not_have(hub: Hub) -> None:
    for find in (look_up, resolve):
        with pytest.raises(CheckpointError, match="Hugging Face has no model 'no/model'"):
            find("no/model")
        assert hub.requests
        hub.requests.clear()


def test_an_id_is_looked_up_by_one_request_and_without_one_where_it_is_cached(hub: Hub) -> None:
    assert look_up("tiny/model") is None
    assert len(hub.requests) == 1
    directory = resolve("tiny/model")
    hub.requests.clear()
    assert look_up("tiny/model") == directory / "config.json"
    assert hub.requests == []


def test_a_repository_of_gguf_files_is_not_served_as_it_is(hub: Hub) -> None:
    (hub.folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"tiny/model of Hugging Face holds no config\.json.*GGUF"):
        look_up("tiny/model")


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as nobody:  # bound, and nobody listens
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        began = time.monotonic()
        with pytest.raises(CheckpointError, match="not on this machine and Hugging Face cannot be reached"):
            look_up("some/model")
        assert time.monotonic() - began < 10, "the library's own retries take 23 s"


def test_offline_and_not_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="cannot be reached"):
        resolve("some/model")


def test_modelscope_without_its_package(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    for find in (look_up, resolve):
        with pytest.raises(CheckpointError, match="pip install modelscope"):
            find("tiny/model", use_modelscope=True)
    assert hub.requests == []


def test_modelscope_and_its_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = types.ModuleType("modelscope")

    def download(name: str, cache_dir: str | None = None) -> str:
        if name == "no/model":
            raise ValueError("404 not found\ndetails")
        return str(Path(cache_dir or "/default") / name)

    package.__dict__["snapshot_download"] = download
    monkeypatch.setitem(sys.modules, "modelscope", package)
    found = resolve("tiny/model", use_modelscope=True, modelscope_cache=tmp_path)
    assert found == tmp_path / "tiny" / "model"
    with pytest.raises(CheckpointError, match="could not be fetched from ModelScope: 404 not found"):
        resolve("no/model", use_modelscope=True)
    assert hub.requests == []
