"""The text of a request's prompt, for who compares prompts and answers none: routing, and the order of a batch.

Three protocols name its parts differently, and what their clients change from turn to turn without changing the prompt
(marks for a cache, ids, the line with which Claude Code begins its system prompt) is left out, or no turn would begin
like the one before.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

SEPARATOR = "\x1e"
"""Between the parts of a prompt."""

UNREAD = frozenset({"cache_control", "id", "status"})
"""Fields of messages, items and their parts that no chat template sees."""

BILLING = "x-anthropic-billing-header"
"""How a line begins that differs in each request of Claude Code's; vLLM leaves it out of the prompt
(vllm/entrypoints/anthropic/serving.py)."""


def prompt_text(fields: Mapping[str, Any]) -> str:
    """The prompt of a request in the order in which the engine sees it; "" if there is none.

    Tools come before the messages, as in chat templates. `cache_salt` comes first: vLLM shares no block between salts.
    A conversation's text begins with the text of each of its earlier turns.
    """
    salt = fields.get("cache_salt") or ""
    messages = _messages(fields)
    if messages:
        return _joined([salt, _stable(fields.get("tools")) or "", *(_message(m) for m in messages)])
    prompt = fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    return _joined([salt, *(_prompt(p) for p in prompts)]) if prompt else ""


def _messages(fields: Mapping[str, Any]) -> list[object]:
    """Of chat, Messages (`system` beside `messages`) and Responses (`instructions`, `input`)."""
    system = fields.get("system") or fields.get("instructions")
    said = fields.get("messages") or fields.get("input")
    if isinstance(said, str):
        said = [{"role": "user", "content": said}]
    if not isinstance(said, list) or not said:
        return []
    return [{"role": "system", "content": system}, *said] if system else said


def _message(message: object) -> str:
    if not isinstance(message, dict):
        return _text(message)
    rest = {k: v for k, v in message.items() if k not in ("role", "content") and not _is_said_by_role(k, v)}
    return _joined([message.get("role"), _content(message.get("content")), _stable(rest) or ""])


def _is_said_by_role(name: str, value: object) -> bool:
    """Responses calls a message one, and takes it without that."""
    return name == "type" and value == "message"


def _content(content: object) -> object:
    """Parts of text as the text that they are."""
    if not isinstance(content, list):
        return content
    parts = [_text_of(part) for part in content]
    return _joined([part for part in parts if not (isinstance(part, str) and part.startswith(BILLING))])


def _text_of(part: object) -> object:
    text = part.get("text") if isinstance(part, dict) else None
    return text if isinstance(text, str) else _stable(part)


def _stable(value: object) -> object:
    """`value` without what is not read, in its first two levels: deeper there are schemas, arguments and results."""
    if isinstance(value, list):
        return [_stable_object(item) for item in value]
    return _stable_object(value)


def _stable_object(value: object) -> object:
    if not isinstance(value, dict):
        return value
    return {k: v for k, v in value.items() if k not in UNREAD}


def _prompt(prompt: object) -> str:
    return ",".join(map(str, prompt)) + "," if isinstance(prompt, list) else _text(prompt)


def _are_tokens(prompt: list[object]) -> bool:
    return all(isinstance(token, int) for token in prompt)


def _joined(parts: Sequence[object]) -> str:
    return "".join(_text(part) + SEPARATOR for part in parts)


def _text(part: object) -> str:
    return part if isinstance(part, str) else json.dumps(part, sort_keys=True)
