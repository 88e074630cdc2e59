"""What /v1/responses may not ask for: what a server would have to keep, and items that vLLM does not read. Pure.

vLLM can keep answers, in the memory of one engine and for ever (VLLM_ENABLE_RESPONSES_API_STORE). The next request may
be another engine's, and an engine may be lost with all that it kept. Of an earlier answer vLLM reads the text of the
first part, and raises where there is none (vllm/entrypoints/openai/responses/utils.py). Of the protocol's thirty kinds
of items it makes messages of READ alone, and raises on the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pomarium.cluster.http.openai_errors import shown

INSTEAD = "send the whole conversation as `input`"

READ = ("message", "function_call", "function_call_output", "reasoning")
"""Values of `type` of items that become messages of a conversation. Messages need not have one."""

ROLES = ("user", "assistant", "system", "developer")

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
        if isinstance(item, dict) and (refusal := _refusal_of(item, f"input[{i}]")):
            return refusal
    return None


def _refusal_of(item: Mapping[str, Any], place: str) -> str | None:
    kind = item.get("type", "message")
    if kind not in READ:
        return f"`{place}.type` must be {_listed(READ)}, not {shown(repr(kind))}: no other items are read here."
    if kind != "message":
        return None
    role = item.get("role")
    if role not in ROLES:
        missing = "" if item.keys() & {"type", "role"} else "a `type`, or "
        return f"`{place}` must have {missing}a `role` of {_listed(ROLES)}."
    if role == "assistant" and not _is_read(item.get("content")):
        return f"`{place}.content` must be a text, or one part that has a text: join its parts, or leave it out."
    return None


def _listed(words: Sequence[str]) -> str:
    *first, last = map(repr, words)
    return f"{', '.join(first)} or {last}"


def _is_read(content: Any) -> bool:
    if not isinstance(content, list):
        return True
    return len(content) == 1 and isinstance(content[0], dict) and isinstance(content[0].get("text"), str)
