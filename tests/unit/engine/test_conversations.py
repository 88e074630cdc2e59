"""A request in messages for a model that cannot take it is 400, and says what to do; every other passes."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from pomarium.cluster.engine.intake.conversations import (
    ALL,
    NO_CALLS,
    NO_TEMPLATE,
    Abilities,
    abilities_of,
    refusal,
)

CHAT = "/v1/chat/completions"
TOOLS = {"tools": [{"type": "function", "function": {"name": "f"}}]}
NO_TOOLS = Abilities(calls=False)


@pytest.mark.parametrize("path", [CHAT, "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize(
    ("fields", "abilities", "reason"),
    [
        (TOOLS, ALL, None),
        (TOOLS, NO_TOOLS, NO_CALLS),
        (TOOLS | {"tool_choice": "auto"}, NO_TOOLS, NO_CALLS),
        (TOOLS | {"tool_choice": {"type": "auto"}}, NO_TOOLS, NO_CALLS),
        (TOOLS | {"tool_choice": "required"}, NO_TOOLS, NO_CALLS),
        (TOOLS | {"tool_choice": "none"}, NO_TOOLS, None),
        (TOOLS | {"tool_choice": {"type": "none"}}, NO_TOOLS, None),
        ({}, NO_TOOLS, None),
        ({"tools": []}, NO_TOOLS, None),
        ({"tools": "text"}, NO_TOOLS, None),
        ({}, Abilities(chats=False), NO_TEMPLATE),
        ({"chat_template": "{{ messages }}"}, Abilities(chats=False), None),
    ],
)
def test_what_a_model_cannot_take(path: str, fields: dict[str, Any], abilities: Abilities, reason: str | None) -> None:
    assert refusal(path, fields, abilities) == reason


def test_other_requests_have_no_messages() -> None:
    assert refusal("/v1/completions", TOOLS, Abilities(chats=False, calls=False)) is None


def renderer(tokenizer: Any, template: str | None = None, parser: Any = None) -> Any:
    return SimpleNamespace(renderer=SimpleNamespace(tokenizer=tokenizer), chat_template=template, parser=parser)


def test_what_an_engine_can_take() -> None:
    tokenizer = PreTrainedTokenizerBase()
    assert abilities_of(renderer(tokenizer), own_form=False) == Abilities(chats=False, calls=False)
    assert abilities_of(renderer(tokenizer), own_form=True) == ALL
    assert abilities_of(renderer(SimpleNamespace()), own_form=False) == ALL
    assert abilities_of(renderer(tokenizer, "given"), own_form=False) == NO_TOOLS
    thinks = SimpleNamespace(tool_parser_cls=None)
    calls = SimpleNamespace(tool_parser_cls=object)
    tokenizer.chat_template = "own"
    assert abilities_of(renderer(tokenizer, None, thinks), own_form=False) == NO_TOOLS
    assert abilities_of(renderer(tokenizer, None, calls), own_form=False) == ALL
