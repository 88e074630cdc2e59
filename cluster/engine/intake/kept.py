"""What /v1/responses would have a server keep between two requests: refused, with what to send instead. Pure.

vLLM can keep answers, in the memory of one engine and for ever (VLLM_ENABLE_RESPONSES_API_STORE). The next request may
be another engine's, and an engine may be lost with all that it kept.
"""

from collections.abc import Mapping
from typing import Any

INSTEAD = "send the whole conversation as `input`"

_ASKED = {
    "previous_response_id": f"names an answer, and none is kept here: leave it out, and {INSTEAD}.",
    "conversation": f"names a conversation, and none is kept here: leave it out, and {INSTEAD}.",
    "background": 'asks for an answer to be fetched later, and none is kept here: leave it out, and use "stream".',
    "store": f"asks for the answer to be kept, and none is kept here: leave it out, and {INSTEAD}.",
}


def refusal(fields: Mapping[str, Any]) -> str | None:
    """Why the request cannot be answered; None: it asks for nothing to be kept. `store` counts where it is given: its
    default in OpenAI's own service is true, and clients that leave it out expect nothing of it."""
    return next((f"`{name}` {why}" for name, why in _ASKED.items() if fields.get(name)), None)
