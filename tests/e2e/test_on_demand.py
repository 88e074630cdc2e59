"""`pomarium serve --models FOLDER --on-demand`: models of which one fits at once are loaded as they are asked for."""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serve_process import CONTEXT, Server
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MESSAGES: Any = [{"role": "user", "content": "hello"}]
TOKENS = 700


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("on_demand")
    models = folder / "models"
    for seed, name in enumerate(("first", "org/second", "spoilt")):
        write_checkpoint("llama", models / name, seed=seed, max_position_embeddings=CONTEXT)
    (models / "empty").mkdir()
    (models / "no-model").mkdir()
    (models / "no-model" / "config.json").write_text("{}")
    server = Server(folder, ["--models", str(models), "--on-demand", "--memory", "2GiB", "--keep", "15s"])
    try:
        server.ensure()
        (models / "spoilt").rename(folder / "away")
        yield server
    finally:
        server.end()


def states(server: Server) -> dict[str, str]:
    """Of each model; all ways to ask agree."""
    listed = {model["id"]: model["state"] for model in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert set(listed) == {model["name"] for model in httpx.get(f"{server.url}/v1/rack").json()["models"]}
    return listed


def until(server: Server, name: str, state: str) -> None:
    while states(server)[name] != state:
        time.sleep(0.1)


def asked(client: OpenAI, model: str, tokens: int = 3) -> Any:
    return client.chat.completions.create(
        model=model, messages=MESSAGES, max_tokens=tokens, extra_body={"ignore_eos": True}
    )


def test_models_come_when_asked_and_leave_for_each_other(server: Server) -> None:
    assert "no-model is left out: " in server.output
    assert states(server) == {"first": "asleep", "org/second": "asleep", "spoilt": "asleep"}
    assert httpx.get(f"{server.url}/health").status_code == 200
    client = server.client()

    stream = client.chat.completions.create(
        model="first", messages=MESSAGES, max_tokens=TOKENS, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    begun = next(iter(stream))
    assert begun.choices
    assert states(server)["first"] == "serving"

    answers: list[Any] = []
    other = threading.Thread(target=lambda: answers.append(asked(client, "org/second")))
    other.start()
    until(server, "org/second", "waiting")
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == TOKENS, "the stream was not cut"
    other.join()
    assert answers[0].usage.completion_tokens == 3
    assert (states(server)["first"], states(server)["org/second"]) == ("asleep", "serving")


def test_one_that_cannot_be_loaded_is_one_clear_error(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions", json={"model": "spoilt", "prompt": "hello", "max_tokens": 3}, timeout=300
    )
    assert answer.status_code == 503
    assert "The engine of `spoilt` is not available: " in answer.json()["error"]["message"]
    reason = str(server.folder / "models" / "spoilt")
    assert reason in answer.json()["error"]["message"]
    health = httpx.get(f"{server.url}/health")
    assert health.status_code == 503
    assert reason in health.json()["models"]["spoilt"]
    at_once = httpx.post(f"{server.url}/v1/completions", json={"model": "spoilt", "prompt": "hello"}, timeout=300)
    assert "it is tried again in some seconds" in at_once.json()["error"]["message"]
    command = [sys.executable, "-m", "pomarium.cluster.cli.main", "models", "list", "--url", server.url]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{reason}  failed as spoilt: " in shown
    assert f"{server.folder / 'models' / 'first'}  asleep as first" in shown
    assert "was lost" not in server.output, "who leaves is not missed"
    until(server, "org/second", "asleep")  # nobody has asked it for --keep, or it left for the one that failed


@pytest.mark.full
def test_one_that_is_mended_is_loaded_again(server: Server) -> None:
    body = {"model": "spoilt", "prompt": "hello"}
    with pytest.raises(httpx.HTTPStatusError):
        httpx.post(f"{server.url}/tokenize", json=body, timeout=300).raise_for_status()
    (server.folder / "away").rename(server.folder / "models" / "spoilt")
    while httpx.post(f"{server.url}/tokenize", json=body, timeout=300).is_error:
        time.sleep(1)
    assert states(server)["spoilt"] == "serving"
    assert httpx.get(f"{server.url}/health").status_code == 200
