"""`pomarium models`: what is there is told, fetched and removed as asked; a wrong use is one sentence."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from filelock import FileLock
from hub_stub import MODEL, Hub, serving
from tiny_models import write_checkpoint
from typed import CTRL_C, Typed

from pomarium.cluster.cli import main as cli
from pomarium.cluster.cli import models, served_states
from pomarium.cluster.cli.progress import Terminal
from pomarium.cluster.cli.serve import fetch
from pomarium.cluster.cli.served_states import ServedModel
from pomarium.cluster.machine import disk
from pomarium.cluster.machine.disk import DiskFullError
from pomarium.cluster.node import ports
from pomarium.cluster.replica import download
from pomarium.cluster.replica.serve_plan import ModelPlan
from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.hub import remove_parts

DEADLINE_S = 240.0
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and empty caches, for this process and those that it starts."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = write_checkpoint("llama_untied", tmp_path / "remote")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "eos_token_id": [2]}))
    with serving(folder) as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        yield found


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    with (tmp_path / "seen").open("w") as out:
        yield Terminal(out, tmp_path / "log")


def said(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = cli.main(["models", *arguments])
    found = capfd.readouterr()
    return code, found.out, found.err


def test_a_model_is_fetched_listed_shown_and_removed(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    assert said(["list"], capfd) == (0, "no models: `pomarium models pull ORG/NAME` fetches one\n", "")
    code, out, _ = said(["pull", MODEL], capfd)
    assert code == 0
    assert out.startswith(f"{MODEL} is in /")

    code, out, _ = said(["list"], capfd)
    head, line = out.splitlines()
    assert head.split()[:3] == ["MODEL", "CACHE", "SIZE"]
    assert line.startswith(f"{MODEL}  Hugging Face")
    assert "llama, float32" in line
    assert "  512  " in line
    assert "yes: " in line

    code, out, _ = said(["list", "--json"], capfd)
    (found,) = json.loads(out)
    assert (found["name"], found["cache"], found["family"], found["context"]) == (MODEL, "Hugging Face", "llama", 512)
    assert (found["whole"], found["refusal"], found["fits"]) == (True, None, 512)
    assert found["kv_bytes"] > 0
    assert found["bytes"] > (hub.folder / WEIGHTS).stat().st_size

    code, out, _ = said(["show", MODEL, "--json"], capfd)
    shown = json.loads(out)
    assert code == 0
    assert (shown["chat_template"], shown["tools"], shown["reasoning"]) == (True, None, None)
    assert shown["sampling"] == {"temperature": 0.3}
    assert "</s> (2: generation_config.json" in shown["endings"]
    code, out, _ = said(["show", MODEL], capfd)
    assert "sampling   temperature 0.3 (generation_config.json)" in out.splitlines()
    assert "parsers    tools: none, reasoning: none" in out.splitlines()

    code, out, err = said(["remove", MODEL], capfd)
    assert (code, out) == (1, "")
    assert err == "pomarium: Standard input is no terminal, so nobody can be asked: give --yes.\n"
    assert said(["remove", MODEL, "--yes"], capfd)[0] == 0
    assert json.loads(said(["list", "--json"], capfd)[1]) == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["pull", "nobody/nothing"], "Hugging Face has no model 'nobody/nothing'"),
        (["pull", "no model"], "There is no model 'no model'"),
        (["pull", "smollm2"], "smollm2 is on this machine"),
        (["remove", "a/b", "--yes"], "No cache has a model 'a/b'"),
        (["show", "a/b"], "`pomarium models pull a/b` fetches it"),
        (["show", "./nothing"], "There is no model './nothing'"),
    ],
)
def test_a_wrong_use_is_one_sentence(
    arguments: list[str], sentence: str, hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    del hub
    code, out, err = said(arguments, capfd)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert sentence in err


def test_what_the_disk_has_no_room_for_is_not_fetched(hub: Hub, tmp_path: Path, terminal: Terminal) -> None:
    hub.sizes[WEIGHTS] = 1 << 60
    with pytest.raises(CheckpointError, match=r"tiny/model takes 1,048,576 TiB more, and the disk of .* has .* free"):
        download.fetch(MODEL, terminal.out)
    assert not list(tmp_path.glob(f"hub/**/{WEIGHTS}"))


@pytest.mark.parametrize(("size", "fits"), [(100, True), (101, False)])
def test_some_of_the_disk_stays_free(size: int, fits: bool) -> None:
    free = 100 + disk.LEAST_FREE
    if fits:
        download.require_room("a/b", size, free, Path("/models"))
        return
    with pytest.raises(DiskFullError, match="HF_HOME"):
        download.require_room("a/b", size, free, Path("/models"))


def test_an_interrupted_download_goes_on_with_the_files_that_are_not_whole(hub: Hub, tmp_path: Path) -> None:
    content = bytes(range(256)) * 4096
    (hub.folder / "merges.txt").write_bytes(content)
    hub.stalls_at = len(content) // 2
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "models", "pull", MODEL]
    pulling = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ)
    assert hub.stalled.wait(DEADLINE_S)
    others = {file.name for file in hub.folder.iterdir()} - {"merges.txt"}
    while others - {file.name for file in tmp_path.glob("hub/**/snapshots/*/*")}:
        assert pulling.poll() is None
        time.sleep(0.1)
    pulling.send_signal(signal.SIGINT)
    assert pulling.wait(DEADLINE_S) == 130
    assert not list(tmp_path.glob("hub/**/*.incomplete"))
    hub.stalls_at = None
    hub.sent.clear()
    done = subprocess.run(command, env=os.environ, timeout=DEADLINE_S, check=True, capture_output=True, text=True)
    folder = Path(done.stdout.split(" is in ")[1].strip())
    assert (folder / "merges.txt").read_bytes() == content
    assert hub.sent == ["merges.txt"]


def test_parts_that_somebody_else_writes_stay(hub: Hub, tmp_path: Path) -> None:
    del hub
    blobs, locks = (tmp_path / "hub" / name / "models--tiny--model" for name in ("", ".locks"))
    writing, left = (blobs / "blobs" / f"{blob}.350000ad.incomplete" for blob in ("one", "two"))
    writing.parent.mkdir(parents=True)
    writing.touch()
    left.touch()
    with FileLock(locks / "one.lock"):
        remove_parts(MODEL)
    assert list(writing.parent.iterdir()) == [writing]


def test_a_terminal_shows_a_bar(hub: Hub) -> None:
    assert hub.folder.is_dir()
    with Typed(["models", "pull", MODEL], os.environ) as typed:
        assert typed.ended() == 0
    assert re.search(r"Fetching \d+ files: +100%", typed.shown)
    assert "dry-run" not in typed.shown
    assert f"{MODEL} is in /" in typed.shown


def test_serve_shows_the_bar_and_ctrl_c_ends_it(hub: Hub, tmp_path: Path) -> None:
    (hub.folder / "merges.txt").write_bytes(bytes(1 << 20))
    hub.stalls_at = 1 << 19
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    with Typed(["serve", MODEL, "--port", str(ports.free(1)[0])], environ) as typed:
        typed.until(f"fetch    {MODEL}")
        typed.until("Fetching")
        assert hub.stalled.wait(DEADLINE_S)
        typed.type(CTRL_C)
        assert typed.ended() == 130
    assert "stopping" in typed.shown
    assert not list(tmp_path.glob("hub/**/*.incomplete"))


def test_serve_fetches_what_is_not_whole(hub: Hub, tmp_path: Path, terminal: Terminal) -> None:
    plans = [ModelPlan("m", MODEL), ModelPlan("again", MODEL), ModelPlan("own", None)]
    fetch(plans, terminal, {})
    assert (tmp_path / "seen").read_text() == f"fetch    {MODEL}\n"
    hub.requests.clear()
    fetch(plans, terminal, {})
    assert hub.requests == []
    fetch(plans, terminal, {"VLLM_USE_MODELSCOPE": "1"})
    shutil.rmtree(tmp_path / "hub")
    fetch([ModelPlan("m", str(hub.folder))], terminal, {})
    assert hub.requests == []


def test_whether_a_model_runs_here() -> None:
    told: dict[str, Any] = {
        "name": "a/b",
        "cache": "Hugging Face",
        "bytes": 1 << 30,
        "family": "strange",
        "weights": None,
        "context": None,
        "refusal": "mlx-lm has no model type 'strange'.",
    }
    fits = told | {"refusal": None, "context": 4096, "kv_bytes": 1 << 20, "fits": 4096}
    assert models.table([fits])[1].endswith("4096     yes: 1 MiB left for K and V")
    assert models.table([fits | {"fits": 512}])[1].endswith("yes, with --max-model-len 512: 1 MiB left for K and V")
    line = models.table([told])[1]
    assert line.startswith("a/b    Hugging Face  1 GiB  strange  -")
    assert line.endswith("no: mlx-lm has no model type 'strange'.")


def test_states_at_an_endpoint_are_told_beside_the_models() -> None:
    served = ServedModel("mine", "/cache/a/b", "waiting", "it waits for memory that c takes")
    there = {
        "name": "a/b", "cache": "Hugging Face", "bytes": 1 << 30, "family": "llama", "weights": None, "context": 4096,
        "refusal": None, "kv_bytes": 1 << 20, "fits": 4096, "served": asdict(served),
    }  # fmt: skip
    head, one, other = models.table([there, there | {"served": None}])
    assert head.split()[-3:] == ["STATE", "RUNS", "HERE"]
    assert "  waiting as mine: it waits for memory that c takes  yes" in one
    assert "  not served  " in other
    assert served_states.of([served], "x/y", Path("/cache/a/b")) == served
    assert served_states.of([replace(served, root="a/b")], "a/b", Path("/elsewhere")) is not None
    assert served_states.of([served], "a/b", Path("/elsewhere")) is None


def test_wrong_uses_of_an_endpoint_are_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = said(["list", "--url", f"http://127.0.0.1:{ports.free(1)[0]}"], capfd)
    assert (code, err.count("\n")) == (1, 1)
    assert "start `pomarium serve`, or leave out --url." in err
    code, _, err = said(["list", "--url", "nonsense"], capfd)
    assert (code, err.startswith("pomarium: --url 'nonsense' is no address")) == (1, True)
    assert said(["show", "--api-key", "k"], capfd)[2] == "pomarium: --api-key is for an endpoint: give --url with it.\n"


def test_what_is_no_model_is_shown_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, err = said(["show", str(tmp_path)], capfd)
    assert (code, err) == (1, f"pomarium: {tmp_path}/config.json names no model_type.\n")
