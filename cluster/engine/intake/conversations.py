"""Requests in messages that an engine cannot take: its model has no chat template, or no known form of tool calls.

vLLM refuses both as well, with what it is missing; these sentences say what a client and an operator can do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PATHS = ("/chat/completions", "/messages", "/responses")
"""What the paths of requests in messages end with."""

NO_TEMPLATE = (
    "This model has no chat template, so it cannot be asked in messages: send its text as `prompt` to /v1/completions, "
    "or start the server with --chat-template FILE."
)
NO_CALLS = (
    "No parser is known for this model's tool calls: leave `tools` out, send `tool_choice` none, or start the server "
    "with --tool-call-parser NAME."
)


@dataclass(frozen=True)
class Abilities:
    """Attributes:
    chats: there is a chat template. calls: what the model writes is read for tool calls.
    """

    chats: bool = True
    calls: bool = True


ALL = Abilities()


def abilities_of(renderer: Any, own_form: bool) -> Abilities:
    """Of the engine that vLLM's OnlineRenderer `renderer` writes prompts for. own_form: it needs no template and no
    parser, as GPT-OSS and Mistral's own tokenizers do."""
    from transformers import PreTrainedTokenizerBase

    tokenizer, parser = renderer.renderer.tokenizer, renderer.parser
    plain = isinstance(tokenizer, PreTrainedTokenizerBase) and not own_form
    return Abilities(
        not plain or renderer.chat_template is not None or tokenizer.chat_template is not None,
        not plain or (parser is not None and parser.tool_parser_cls is not None),
    )


def refusal(path: str, fields: Mapping[str, Any], abilities: Abilities) -> str | None:
    """Why a request is not answered; None: it can be."""
    if not path.endswith(PATHS):
        return None
    if not abilities.chats and not fields.get("chat_template"):
        return NO_TEMPLATE
    tools, choice = fields.get("tools"), fields.get("tool_choice", "auto")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if not abilities.calls and isinstance(tools, list) and tools and kind not in (None, "none"):
        return NO_CALLS
    return None
