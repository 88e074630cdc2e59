"""What engines are asked by, told apart by a request's path, and how each protocol tells an error. Pure.

    path --GENERATED, PROMPTED, OTHER_KINDS--> what becomes of a request
    an error in OpenAI's body (openai_errors.py) --error_body--> the body that the path's own clients read
                                                 --last_event--> the end of a stream whose status has been sent

Sources: the error pages of both services' API references; openai/_streaming.py and anthropic/_streaming.py, which say
what their SDKs raise on.
"""

import json
from http import HTTPStatus
from typing import Any

PRIORITY, BATCH = "x-pomarium-priority", "batch"
"""Header of requests that let others go first, and its value: batches have it, and whoever else likes to yield."""

RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
COUNT_TOKENS = f"{MESSAGES}/count_tokens"

PROMPTED = frozenset({"/v1/chat/completions", "/v1/completions", RESPONSES, MESSAGES})
"""Paths whose prompt an engine computes, and then has in its cache."""

GENERATED = PROMPTED | {COUNT_TOKENS, "/tokenize", "/detokenize"}
"""Paths that an engine answers."""

_RANKS, _SCORES = "ranks texts", "compares texts"
OTHER_KINDS = {
    "/v1/embeddings": "makes embeddings",
    "/v2/embed": "makes embeddings",
    "/pooling": "makes embeddings",
    "/classify": "classifies texts",
    "/rerank": _RANKS,
    "/v1/rerank": _RANKS,
    "/v2/rerank": _RANKS,
    "/score": _SCORES,
    "/v1/score": _SCORES,
}
"""Paths of vLLM's that take a model of another kind, and what such a model does."""

_ANTHROPIC_KINDS: dict[int, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
}


def is_anthropic(path: str) -> bool:
    """Whether `path` is of Anthropic's protocol; all others are OpenAI's, or have its errors."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """Anthropic's body of an error with `status`."""
    kind = _ANTHROPIC_KINDS.get(status) or ("api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body(path: str, status: int, body: dict[str, Any]) -> dict[str, Any]:
    """The body of an error for a client of `path`. `body`: OpenAI's."""
    return anthropic_error(status, body["error"]["message"]) if is_anthropic(path) else body


def last_event(path: str, status: int, body: dict[str, Any]) -> bytes:
    """What a stream of `path` ends with that could not be answered to its end. `body`: OpenAI's."""
    if is_anthropic(path):
        return _named_event(error_body(path, status, body))
    if path == RESPONSES:
        error = body["error"]
        told = {name: error[name] for name in ("code", "message", "param")}
        # `error` is what OpenAI's SDKs raise on, the rest what the protocol's event has.
        return _named_event({"type": "error", "sequence_number": 0, **told, "error": error})
    return f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n".encode()


def _named_event(fields: dict[str, Any]) -> bytes:
    return f"event: {fields['type']}\ndata: {json.dumps(fields)}\n\n".encode()
