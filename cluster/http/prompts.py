"""The text of a request's prompt, for who compares prompts and answers none: routing, and the order of a batch."""

import json
from collections.abc import Sequence
from typing import Any

SEPARATOR = "\x1e"
"""Between the parts of a prompt."""


def prompt_text(fields: dict[str, Any]) -> str:
    """The prompt of an OpenAI request in the order in which the engine sees it; "" if there is none.

    Tools come before the messages, as in chat templates. `cache_salt` comes first: vLLM shares no block between salts.
    A conversation's text begins with the text of each of its earlier turns.
    """
    salt = fields.get("cache_salt") or ""
    if isinstance(messages := fields.get("messages"), list):
        return _joined([salt, fields.get("tools") or "", *(_message(m) for m in messages)])
    prompt = fields.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not _are_tokens(prompt) else [prompt]
    return _joined([salt, *(_prompt(p) for p in prompts)]) if prompt else ""


def _message(message: object) -> str:
    if not isinstance(message, dict):
        return _text(message)
    rest = {k: v for k, v in message.items() if k not in ("role", "content")}
    return _joined([message.get("role"), message.get("content"), rest or ""])


def _prompt(prompt: object) -> str:
    return ",".join(map(str, prompt)) + "," if isinstance(prompt, list) else _text(prompt)


def _are_tokens(prompt: list[object]) -> bool:
    return all(isinstance(token, int) for token in prompt)


def _joined(parts: Sequence[object]) -> str:
    return "".join(_text(part) + SEPARATOR for part in parts)


def _text(part: object) -> str:
    return part if isinstance(part, str) else json.dumps(part, sort_keys=True)
