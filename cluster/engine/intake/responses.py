"""What /v1/responses may not ask for: what a server would have to keep, and items that vLLM cannot read. Pure.

vLLM can keep answers, in the memory of one engine and for ever (VLLM_ENABLE_RESPONSES_API_STORE). The next request may
be another engine's, and an engine may be lost with all that it kept. Of an earlier answer vLLM reads the text of the
first part, and raises where there is none (vllm/entrypoints/openai/responses/utils.py).
"""

from collections.abc import Mapping
from typing import Any

INSTEAD = "send the whole conversation as `input`"

_KEPT = {
    "previous_response_id": f"names an answer, and none is kept here: leave it out, and {INSTEAD}.",
    "conversation": f"names a conversation, and none is kept here: leave it out, and {INSTEAD}.",
    "background": 'asks for an answer to be fetched later, and none is kept here: leave it out, and use "stream".',
    "store": f"asks for the answer to be kept, and none is kept here: leave it out, and {INSTEAD}.",
}


def refusal(fields: Mapping[str, Any]) -> str | None:
    """Why the request is not answered; None if it may be. `store` counts where it is given: its default in OpenAI's own
    service is true, and clients that leave it out expect nothing of it."""
    for name, why in _KEPT.items():
        if fields.get(name):
            return f"`{name}` {why}"
    items = fields.get("input")
    for i, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, dict) and item.get("role") == "assistant" and not _is_read(item.get("content")):
            return f"`input[{i}].content` must be a text, or one part that has a text: join its parts, or leave it out."
    return None


def _is_read(content: Any) -> bool:
    if not isinstance(content, list):
        return True
    return len(content) == 1 and isinstance(content[0], dict) and isinstance(content[0].get("text"), str)
