"""Arguments of earlier tool calls in a conversation: JSON within JSON, which vLLM parses for the chat template.

They stand in `messages` (chat) and in `input` (Responses). Anthropic's Messages has them as objects of the body itself.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pomarium.cluster.http.bodies import DEPTH, BodyError, parsed


def refusal(fields: Mapping[str, Any]) -> str | None:
    """Why the arguments cannot be read; None if they can, or are of no valid form at all, which vLLM says itself."""
    for place, arguments in _arguments(fields):
        if arguments.count("[") + arguments.count("{") <= DEPTH:
            continue
        try:
            parsed(arguments)
        except BodyError as error:
            return f"`{place}` {error.reason}."
    return None


def _arguments(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for field in ("messages", "input"):
        items = fields.get(field)
        for i, item in enumerate(items if isinstance(items, list) else ()):
            if isinstance(item, dict):
                yield from ((f"{field}[{i}].{place}", text) for place, text in _arguments_of(item))


def _arguments_of(item: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if isinstance(text := item.get("arguments"), str):
        yield "arguments", text
    calls = item.get("tool_calls")
    for j, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
            yield f"tool_calls[{j}].function.arguments", text
