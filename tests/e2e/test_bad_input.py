"""Bad requests get OpenAI's error body and harm nobody; what cannot start says so in one line."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import APIStatusError, OpenAI
from serve_process import READY_S, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "smollm2"
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
BAD_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("change", "status", "word"),
    [
        ({"model": "nobody"}, 404, "nobody"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "context length"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": -1, "stream": True}, 400, "max_tokens"),
        ({"temperature": -3}, 400, "temperature"),
        ({"messages": "text"}, 400, "messages"),
        ({"response_format": BAD_SCHEMA}, 400, "nonsense"),
        ({"structured_outputs": {"regex": "[0-9"}}, 400, "regex"),
        ({"tools": [TOOL]}, 400, "--tool-call-parser NAME"),
    ],
)
def test_a_bad_request_gets_openais_error(client: OpenAI, change: dict[str, Any], status: int, word: str) -> None:
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 4} | change
    with pytest.raises(APIStatusError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    error: Any = caught.value.body
    assert caught.value.status_code == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    assert word in error["message"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt": [49152]}, "49152"),
        ({"prompt": [49152], "stream": True}, "49152"),
        ({"prompt": [49152], "echo": True}, "49152"),
        ({"prompt": [[504], [504, 49155]]}, "49155"),
        ({"prompt": [504, -1]}, "-1"),
        ({"stop_token_ids": [49152]}, "49152"),
        ({"allowed_token_ids": [49152]}, "allowed_token_ids"),
        ({"logit_bias": {"49152": 1}}, "49152"),
    ],
)
def test_a_token_that_the_model_does_not_have(client: OpenAI, change: dict[str, Any], named: str) -> None:
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 2} | change
    with pytest.raises(APIStatusError) as caught:
        client.post("/completions", body=body, cast_to=object)
    error: Any = caught.value.body
    assert caught.value.status_code == error["code"] == 400
    assert named in error["message"]


@pytest.mark.parametrize(("tokens", "status"), [([504], 200), ([49152], 200), ([1 << 40], 400), ([-1], 400)])
def test_detokenize_reads_no_memory_of_the_model(server: Server, tokens: list[int], status: int) -> None:
    answer = httpx.post(f"{server.url}/detokenize", json={"model": MODEL, "tokens": tokens}, timeout=20)
    assert answer.status_code == status


@pytest.mark.parametrize("content", [b"{nope", b"[1]", b"", b"\xff\xfe"])
def test_a_body_that_is_no_json_object(server: Server, content: bytes) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=content, timeout=20)
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nix", 404), ("GET", "/v1/chat/completions", 405)])
def test_an_unknown_path_or_method(server: Server, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, server.url + path, timeout=20)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == status


def test_unknown_fields_are_accepted(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=2, extra_body={"no_field": 1})
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_a_bad_request_does_not_disturb_a_running_one(client: OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Once", max_tokens=24, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    with pytest.raises(APIStatusError):
        client.completions.create(model=MODEL, prompt="Once", max_tokens=-1)
    with pytest.raises(APIStatusError):
        client.completions.create(model="nobody", prompt="Once")
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == "length"


@pytest.mark.parametrize(
    ("arguments", "config", "sentence"),
    [
        (["--max-model-len", "1000000"], None, "give at most 8192"),
        ([], {"model_type": "nonesuch", "architectures": ["NonesuchForCausalLM"]}, "nonesuch"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    tmp_path: Path, arguments: list[str], config: dict[str, Any] | None, sentence: str
) -> None:
    model: list[str] = []
    if config is not None:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        model = [str(folder)]
    failing = Server(tmp_path)
    try:
        process = failing.start([*model, "--port", "18734", *arguments])
        assert process.wait(READY_S) == 1
        last = failing.output.splitlines()[-1]
        assert last.startswith("pomarium: ")
        assert sentence in last
        assert "Traceback" not in failing.output
        assert failing.processes() == []
    finally:
        failing.kill()
