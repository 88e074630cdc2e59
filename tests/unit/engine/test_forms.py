"""A request of a wrong form is told in one sentence where it is wrong and what was expected, whatever pydantic says."""

import copy
from typing import Any

import pytest
from fastapi import Depends, FastAPI
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.exception_handling import register
from vllm.entrypoints.serve.utils.api_utils import validate_json_request
from vllm.exceptions import VLLMValidationError

from pomarium.cluster.engine import form_answers
from pomarium.cluster.engine.intake import calls, conversations, forms, kinds, responses
from pomarium.cluster.engine.intake.guard import Guard, Rules

HI: Any = [{"role": "user", "content": "Hi"}]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
MODELS: dict[str, Any] = {
    CHAT: ChatCompletionRequest,
    COMPLETIONS: CompletionRequest,
    RESPONSES: ResponsesRequest,
    MESSAGES: AnthropicMessagesRequest,
}
BASES: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": HI},
    COMPLETIONS: {"model": "m", "prompt": "Hi"},
    RESPONSES: {"model": "m", "input": "Hi"},
    MESSAGES: {"model": "m", "messages": HI, "max_tokens": 4},
}
BLOCKS = "'text', 'image', 'tool_use', 'tool_result', 'tool_reference', 'thinking' or 'redacted_thinking'"
PARTS = "'input_text', 'input_image' or 'input_file'"


def user(*content: Any) -> Any:
    return [{"role": "user", "content": list(content)}]


CASES: list[tuple[str, dict[str, Any], str]] = [
    (MESSAGES, {"max_tokens": ...}, "The request lacks `max_tokens`."),
    (MESSAGES, {"messages": "text"}, "`messages` must be a list, not 'text'."),
    (MESSAGES, {"messages": [1]}, "`messages[0]` must be an object, not 1."),
    (MESSAGES, {"messages": [*HI, {"role": "user"}]}, "`messages[1]` lacks `content`."),
    (
        MESSAGES,
        {"messages": [{"role": "bot", "content": "x"}]},
        "`messages[0].role` must be 'user', 'assistant' or 'system', not 'bot'.",
    ),
    (
        MESSAGES,
        {"messages": [{"role": "user", "content": 1}]},
        "`messages[0].content` must be a text or a list, not 1.",
    ),
    (
        MESSAGES,
        {"messages": user({"type": "video"})},
        f"`messages[0].content[0].type` must be {BLOCKS}, not 'video'.",
    ),
    (MESSAGES, {"messages": user({"type": "text", "text": 3})}, "`messages[0].content[0].text` must be a text, not 3."),
    (MESSAGES, {"max_tokens": "x" * 200}, f"`max_tokens` must be a whole number, not '{'x' * 59}...."),
    (MESSAGES, {"max_tokens": 1.5}, "`max_tokens` must be a whole number, not 1.5."),
    (MESSAGES, {"max_tokens": None}, "`max_tokens` must be a whole number, not null."),
    (MESSAGES, {"stream": "maybe"}, "`stream` must be true or false, not 'maybe'."),
    (MESSAGES, {"tools": [{}]}, "`tools[0]` lacks `name` and `input_schema`."),
    (MESSAGES, {"tool_choice": {"type": "tool"}}, "`tool_choice` is refused: tool_choice.name is required"),
    (RESPONSES, {"input": ...}, "The request lacks `input`."),
    (RESPONSES, {"input": 1}, "`input` must be a text or a list, not 1."),
    (RESPONSES, {"input": [1]}, "`input[0]` must be an object, not 1."),
    (RESPONSES, {"input": [{"role": "user"}]}, "`input[0]` lacks `content`."),
    (RESPONSES, {"input": user({"type": "text"})}, f"`input[0].content[0].type` must be {PARTS}, not 'text'."),
    (RESPONSES, {"input": user({"type": "input_text"})}, "`input[0].content[0]` lacks `text`."),
    (RESPONSES, {"input": [{"type": "function_call"}]}, "`input[0]` lacks `arguments`, `call_id` and `name`."),
    (
        RESPONSES,
        {"input": [{"type": "function_call_output", "call_id": "1", "output": 3}]},
        "`input[0].output` must be a text or a list, not 3.",
    ),
    (RESPONSES, {"tools": [{}]}, "`tools[0]` lacks `type`."),
    (RESPONSES, {"tools": [{"type": "nope"}]}, "`tools[0].type` must be "),
    (RESPONSES, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools[0]` lacks `name`."),
    (RESPONSES, {"tool_choice": "x"}, "`tool_choice` must be 'none', 'auto' or 'required', not 'x'."),
    (
        RESPONSES,
        {"text": {"format": {"type": "x"}}},
        "`text.format.type` must be 'text', 'json_schema' or 'json_object', not 'x'.",
    ),
    (CHAT, {"messages": [1]}, "`messages[0]` must be an object, not 1."),
    (CHAT, {"messages": [{"content": "x"}]}, "`messages[0]` lacks `role`."),
    (CHAT, {"messages": [{"role": "user", "content": 1}]}, "`messages[0].content` must be a text or a list, not 1."),
    (CHAT, {"tools": [{"type": "function"}]}, "`tools[0]` lacks `function`."),
    (
        CHAT,
        {"messages": [*HI, {"role": "assistant", "tool_calls": [{}]}]},
        "`messages[1].tool_calls[0]` lacks `type`, `id` and `function`.",
    ),
    (
        CHAT,
        {"response_format": {"type": "x"}},
        "`response_format.type` must be 'text', 'json_object', 'json_schema' or 'structural_tag', not 'x'.",
    ),
    (CHAT, {"seed": 2**63}, "`seed` must be less than or equal to 9223372036854775807, not 9223372036854775808."),
    (CHAT, {"messages": None}, "`messages` must be a list, not null."),
    (
        CHAT,
        {"messages": user({"type": "text", "text": "a"}, "b")},
        "`messages[0].content[1]` must be an object, not 'b'.",
    ),
    (CHAT, {"messages": user({"type": "text", "text": 3})}, "`messages[0].content[0].text` must be a text, not 3."),
    (CHAT, {"messages": user({"type": "text"})}, "`messages[0].content[0]` lacks `text`."),
    (
        MESSAGES,
        {"messages": user({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": 3}]})},
        "`messages[0].content[0].content[0].text` must be a text, not 3.",
    ),
    (
        CHAT,
        {"messages": [{"role": "assistant", "tool_calls": "x"}]},
        "`messages[0].tool_calls` must be a list, not 'x'.",
    ),
    (CHAT, {"structured_outputs": 3}, "`structured_outputs` must be an object, not 3."),
    (RESPONSES, {"input": [{"type": "item_reference", "id": "1"}]}, "`input[0].type` must be 'message', "),
    (RESPONSES, {"input": [{}]}, "`input[0]` must have a `type`, or a `role` of 'user', "),
    (RESPONSES, {"input": [{"role": "bot", "content": "x"}]}, "`input[0]` must have a `role` of 'user', "),
    (COMPLETIONS, {"prompt": {"a": 1}}, "`prompt` must be a list or a text, not an object."),
    (COMPLETIONS, {"stop": [1]}, "`stop[0]` must be a text, not 1."),
]


def body_of(path: str, change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (BASES[path] | change).items() if value is not ...}


@pytest.fixture(scope="module")
def client() -> TestClient:
    """vLLM's handlers and its forms of requests behind the guard; whoever passes is answered."""
    form_answers.install()
    form_answers.install()
    app = FastAPI()
    register.init_exception_handler(app)

    def route(path: str, model: Any) -> None:
        async def answer(request: model) -> dict[str, bool]:  # type: ignore[valid-type]
            for message in getattr(request, "messages", ()):
                parts = message.get("content") if isinstance(message, dict) else None
                list(() if isinstance(parts, str | None) else parts)  # as vLLM's renderer reads them, late
            return {"passed": True}

        app.post(path, dependencies=[Depends(validate_json_request)])(answer)

    for path, model in MODELS.items():
        route(path, model)
    app.add_middleware(Guard, rules=Rules(chars=100_000, compiles=False))
    return TestClient(app, raise_server_exceptions=False)


def told(client: TestClient, path: str, body: Any) -> dict[str, Any]:
    answer = client.post(path, json=body)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == ({"type", "error"} if path == MESSAGES else {"error"})
    error: dict[str, Any] = answer.json()["error"]
    return error


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "change", "sentence"), CASES)
def test_a_wrong_form_is_told_in_one_sentence(
    client: TestClient, path: str, change: dict[str, Any], sentence: str, stream: bool
) -> None:
    error = told(client, path, body_of(path, {"stream": stream} | change))
    assert error["message"].startswith(sentence)
    assert "\n" not in error["message"]
    if path == MESSAGES:
        assert error["type"] == "invalid_request_error"
    else:
        assert (error["type"], error["code"]) == ("BadRequestError", 400)
        assert error["param"] is None or error["param"].split("[")[0].split(".")[0] in change


def test_what_is_checked_late_is_told_with_its_place(client: TestClient) -> None:
    error = told(client, CHAT, {"model": "m", "messages": [*HI, *user({"type": "input_audio"})]})
    assert error["message"] == "`messages[1].content[0]` lacks `input_audio`."
    error = told(client, CHAT, {"model": "m", "messages": user({"type": "video"})})
    assert error["message"].startswith("`messages[0].content[0].type` must be 'text', ")


@pytest.mark.parametrize("path", list(MODELS))
@pytest.mark.parametrize("headers", [{"content-type": "text/plain"}, {"content-type": ""}])
def test_what_is_no_json_by_its_header_is_told_so(client: TestClient, path: str, headers: dict[str, str]) -> None:
    answer = client.post(path, content=b'{"model": "m"}', headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == form_answers.NO_JSON
    assert answer.json().get("type") == ("error" if path == MESSAGES else None)


WRONG = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=3) | st.floats(allow_nan=False),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "function", "id"]), inner, max_size=3
        )
        | st.dictionaries(st.just("type"), st.sampled_from(["function", "message", "text", "reasoning", "input_text"]))
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("path", list(MODELS))
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_whatever_is_wrong_it_is_one_sentence_on_a_place_that_there_is(path: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(MODELS[path].model_fields)))
    body = BASES[path] | {name: data.draw(WRONG)}
    if refused_before(path, body):
        return
    try:
        MODELS[path].model_validate(copy.deepcopy(body))
    except ValidationError as error:
        found = forms.fault(error.errors(include_url=False), body)
        assert found.place.startswith((name, ""))
        assert "\n" not in found.sentence
        assert len(found.sentence) < 1000
    except (VLLMValidationError, ValueError):
        pass  # one sentence of vLLM's


def refused_before(path: str, body: dict[str, Any]) -> str | None:
    return (
        kinds.refusal(body)
        or calls.refusal(body)
        or (responses.refusal(body) if path == RESPONSES else None)
        or conversations.refusal(path, body, conversations.ALL)
    )
