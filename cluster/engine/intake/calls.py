"""Arguments of earlier tool calls in a conversation: JSON within JSON, which vLLM parses for the chat template."""

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
    messages = fields.get("messages")
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        if not isinstance(message, dict):
            continue
        calls = message.get("tool_calls")
        for j, call in enumerate(calls if isinstance(calls, list) else ()):
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict) and isinstance(text := function.get("arguments"), str):
                yield f"messages[{i}].tool_calls[{j}].function.arguments", text
