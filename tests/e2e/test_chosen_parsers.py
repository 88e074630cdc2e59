"""A plain `pomarium serve` reads tool calls and thoughts of models whose templates show their form, and says so."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serve_process import CONTEXT, Server
from tiny_models import VOCAB_SIZE, write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MESSAGES: Any = [{"role": "user", "content": "look up Paris"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}
CALL = r'<tool_call>\{"name": "look_up", "arguments": \{"city": "(Paris|Rome)"\}\}</tool_call>'
"""What the model is held to, for it has learnt nothing."""
HERMES = (
    '{% if tools %}{{ tools | tojson }} answer <tool_call>{"name": N, "arguments": A}</tool_call>{% endif %}'
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}assistant "
)
THINKS = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<think>{% endif %}"
)


def model(folder: Path, template: str | None, tokens: tuple[str, ...] = ()) -> str:
    """A tiny model with this chat template, and tokens of its own beyond the tiny tokenizer's."""
    write_checkpoint("llama", folder, vocab_size=VOCAB_SIZE + len(tokens), max_position_embeddings=CONTEXT)
    file, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    content, settings = json.loads(file.read_text()), json.loads(config.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    content["added_tokens"] += [{"id": VOCAB_SIZE + i, "content": token, **flags} for i, token in enumerate(tokens)]
    file.write_text(json.dumps(content))
    settings.pop("chat_template")
    config.write_text(json.dumps(settings | ({} if template is None else {"chat_template": template})))
    return str(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("parsers")
    models = [
        model(folder / "calls", HERMES),
        model(folder / "thinks", THINKS, ("<think>", "</think>")),
        model(folder / "bare", None),
    ]
    server = Server(folder)
    try:
        server.ensure(*models)
        yield server
    finally:
        server.end()


@pytest.fixture
def folder_of_calls(server: Server) -> Path:
    return server.folder / "calls"


@pytest.fixture
def client(server: Server) -> OpenAI:
    return server.client()


def test_the_terminal_says_what_was_chosen(server: Server) -> None:
    lines = server.output.splitlines()
    change = "--tool-call-parser and --reasoning-parser change it"
    assert f"calls: tools: hermes, reasoning: none; {change}" in lines
    assert f"thinks: tools: none, reasoning: deepseek_r1; {change}" in lines
    assert f"bare: tools: none, reasoning: none; {change}" in lines


def test_a_request_with_tools_gets_a_call(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="calls",
        messages=MESSAGES,
        tools=[TOOL],
        max_tokens=200,
        extra_body={"structured_outputs": {"regex": CALL}},
    )
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls or []
    assert choice.finish_reason == "tool_calls"
    assert call.type == "function"
    assert call.function.name == "look_up"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_streamed_call_comes_in_fragments_that_the_client_parses(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="calls",
        messages=MESSAGES,
        tools=[TOOL],
        max_tokens=200,
        extra_body={"structured_outputs": {"regex": CALL}},
    ) as stream:
        fragments = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        (call,) = stream.get_final_completion().choices[0].message.tool_calls or []
    assert fragments
    assert "".join(fragment.arguments_delta for fragment in fragments) == call.function.arguments
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look_up"}}])
def test_a_call_that_is_demanded(client: OpenAI, folder_of_calls: Path, choice: Any) -> None:
    tokens = json.loads((folder_of_calls / "tokenizer.json").read_text())["model"]["vocab"]
    answer = client.chat.completions.create(
        model="calls",
        messages=MESSAGES,
        tools=[TOOL],
        tool_choice=choice,
        max_tokens=200,
        temperature=0,
        logit_bias={str(tokens["]"]): 100, str(tokens["Ġ"]): -100},  # else it writes blanks, or one call after another
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize("tools", [{}, {"tools": [TOOL]}])
def test_what_is_no_call_stays_an_answer(client: OpenAI, tools: Any) -> None:
    held: Any = {"structured_outputs": {"regex": "It is Paris, not <tool_calls>"}}
    answer = client.chat.completions.create(model="calls", messages=MESSAGES, max_tokens=99, extra_body=held, **tools)
    assert answer.choices[0].message.content == "It is Paris, not <tool_calls>"
    assert not answer.choices[0].message.tool_calls


def test_thoughts_are_apart_from_the_answer(server: Server) -> None:
    body = {"model": "thinks", "messages": MESSAGES, "max_tokens": 5, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    message = answer["choices"][0]["message"]
    assert message["reasoning"]
    assert not message["content"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "thinks", "tools": [TOOL]}, "leave `tools` out"),
        ({"model": "bare"}, "/v1/completions, or start the server with --chat-template FILE"),
    ],
)
def test_what_a_model_cannot_do_is_said(server: Server, change: dict[str, Any], words: str) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": MESSAGES} | change, timeout=120)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    asked = {"model": change["model"], "prompt": "Once", "max_tokens": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=asked, timeout=120).status_code == 200
