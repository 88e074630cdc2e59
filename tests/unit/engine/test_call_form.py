"""Calls that an answer has to consist of are closed: what vLLM streams as their arguments is JSON."""

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionToolsParam
from vllm.tool_parsers import utils

from pomarium.cluster.engine import call_form

PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "_get_tool_schema_from_name_and_params", call_form._schema_of_call)
    call_form.install()
    call_form.install()


def admitted(text: str) -> bool:
    """Whether an answer may begin like that."""
    tool = ChatCompletionToolsParam.model_validate({"function": {"name": "weather", "parameters": PARAMETERS}})
    schema: Any = utils.get_json_schema_from_tools("required", [tool])
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_json_schema(json.dumps(schema)), log_level=0)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens)


@pytest.mark.parametrize(
    ("text", "may"),
    [
        ('[{"name": "weather", "parameters": {"city": "Paris"}}]', True),
        ('[{"name": "weather", "parameters": {"city": "Paris", "unit": 1}}, {"name": "weather", "par', True),
        ('[{"name": "weather", "parameters": {"city": "Paris"}, "', False),
        ('[{"name": "rain", "', False),
    ],
)
def test_a_call_ends_behind_its_parameters(text: str, may: bool) -> None:
    assert admitted(text) is may
