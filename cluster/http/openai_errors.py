"""OpenAI's error body, for what the ingress itself refuses; engines answer with vLLM's, which have the same shape.

protocols.py makes other protocols' bodies of these.
"""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

RETRY_AFTER_S = 5
"""When a client that got 503 is to try again: another engine may serve at once, a new one after seconds."""
LONGEST_SHOWN = 100
"""Characters of what a client sent that an error repeats."""
LONGEST_MESSAGE = 2000


class RefusalError(Exception):
    """An answer that ends the request here: HTTP status and OpenAI error body, as the functions below give them, and
    HTTP headers beside those that the status has (`headers`)."""

    def __init__(self, status: int, body: dict[str, Any], more: Mapping[str, str] | None = None) -> None:
        super().__init__(status, body)
        self.status = status
        self.body = body
        self.headers = headers(status) | dict(more or {})


def headers(status: int) -> dict[str, str]:
    """HTTP headers of an error with `status`."""
    return {"Retry-After": str(RETRY_AFTER_S)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}


def shown(given: object) -> str:
    """What a client sent, as an error repeats it: its beginning."""
    text = str(given)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def body(status: int, message: str, *, kind: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`; `code` repeats the HTTP status, as vLLM does."""
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}..."
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def invalid_json(reason: str) -> tuple[int, dict[str, Any]]:
    """400 for a body that is not a JSON object."""
    return _error(HTTPStatus.BAD_REQUEST, f"The request body is not valid JSON: {reason}.", "BadRequestError")


def invalid(message: str, param: str | None) -> tuple[int, dict[str, Any]]:
    """400 for a value that is not accepted."""
    return _error(HTTPStatus.BAD_REQUEST, message, "BadRequestError", param)


def unknown(message: str) -> tuple[int, dict[str, Any]]:
    """404 for an object that there is not."""
    return _error(HTTPStatus.NOT_FOUND, message, "NotFoundError")


def unknown_model(name: object, served: list[str]) -> tuple[int, dict[str, Any]]:
    """404 for a model that is not served here."""
    message = f"The model `{shown(name)}` does not exist. Served here: {', '.join(served)}."
    return _error(HTTPStatus.NOT_FOUND, message, "NotFoundError", "model")


def model_required(served: list[str]) -> tuple[int, dict[str, Any]]:
    """400 for a request that names no model where several are served."""
    message = f"The request names no model. Served here: {', '.join(served)}."
    return _error(HTTPStatus.BAD_REQUEST, message, "BadRequestError", "model")


def too_large(most: int) -> tuple[int, dict[str, Any]]:
    """413 for a body of more than `most` bytes."""
    message = f"The request's body has more than the {most} bytes that are accepted (POMARIUM_MAX_BODY, _MAX_UPLOAD)."
    return _error(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, "BadRequestError")


def too_slow(timeout: float) -> tuple[int, dict[str, Any]]:
    """408 for a body that did not come in time. `timeout`: seconds."""
    message = f"The request's body did not come within {timeout:g} s and what its size takes (POMARIUM_CLIENT_TIMEOUT)."
    return _error(HTTPStatus.REQUEST_TIMEOUT, message, "BadRequestError")


def overloaded(model: str, waiting: int, seconds: int) -> tuple[int, dict[str, Any]]:
    """429 for what would wait for too long. waiting: requests that do. seconds: after which it may be tried again."""
    message = (
        f"The engines of `{model}` have more to do than they can: {waiting} requests wait for them. Try again in "
        f"{seconds} s."
    )
    return _error(HTTPStatus.TOO_MANY_REQUESTS, message, "RateLimitError")


def too_late(timeout_s: float) -> tuple[int, dict[str, Any]]:
    """408 for an answer that is not there in the time that its request leaves it."""
    message = f"The answer was not complete within the {timeout_s:g} s that the request leaves it."
    return _error(HTTPStatus.REQUEST_TIMEOUT, message, "TimeoutError")


def unauthorized() -> tuple[int, dict[str, Any]]:
    """401 for a missing or wrong key."""
    message = "Wrong or missing API key: send `Authorization: Bearer KEY` or `x-api-key: KEY`."
    return _error(HTTPStatus.UNAUTHORIZED, message, "AuthenticationError")


def other_kind(model: str, path: str, does: str) -> tuple[int, dict[str, Any]]:
    """400 for a path that takes a model of another kind. `does`: what such a model does."""
    message = f"`{model}` is a model that generates text, and {path} takes one that {does}: none is served here."
    return _error(HTTPStatus.BAD_REQUEST, message, "BadRequestError", "model")


def engine_unavailable(model: str, reason: str) -> tuple[int, dict[str, Any]]:
    """503 while no engine of the model answers, or when it was lost under way."""
    message = f"The engine of `{model}` is not available: {reason.removesuffix('.')}. Try again shortly."
    return _error(HTTPStatus.SERVICE_UNAVAILABLE, message, "ServiceUnavailableError")


def unavailable(message: str) -> tuple[int, dict[str, Any]]:
    """503 for what cannot be told now."""
    return _error(HTTPStatus.SERVICE_UNAVAILABLE, message, "ServiceUnavailableError")


def http(status: int, message: str) -> tuple[int, dict[str, Any]]:
    """No such path, or not with this method."""
    kind = "NotFoundError" if status == HTTPStatus.NOT_FOUND else "BadRequestError"
    return status, body(status, message, kind=kind)


def internal(request_id: str) -> tuple[int, dict[str, Any]]:
    """500 for a fault of ours; the log has the traceback under this id."""
    return _error(HTTPStatus.INTERNAL_SERVER_ERROR, f"Internal error, request {request_id}.", "InternalServerError")


def _error(status: HTTPStatus, message: str, kind: str, param: str | None = None) -> tuple[int, dict[str, Any]]:
    return status.value, body(status.value, message, kind=kind, param=param)
