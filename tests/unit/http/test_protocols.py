"""Which protocol a path is of, and how it tells an error: each client reads its own."""

import json
from typing import Any

import pytest

from pomarium.cluster.http import openai_errors, protocols
from pomarium.cluster.http.anthropic_errors import message_of

OPENAI = openai_errors.body(400, "No.", kind="BadRequestError", param="model")


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/messages", True),
        ("/v1/messages/count_tokens", True),
        ("/v1/messages/batches", True),
        ("/v1/messagesx", False),
        ("/v1/responses", False),
        ("/v1/models", False),
    ],
)
def test_what_is_below_messages_is_anthropic_s(path: str, found: bool) -> None:
    assert protocols.is_anthropic(path) is found
    assert (protocols.error_body(path, 400, OPENAI) == OPENAI) is not found


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (599, "api_error"),
    ],
)
def test_a_status_has_anthropic_s_kind(status: int, kind: str) -> None:
    assert protocols.anthropic_error(status, "No.") == {"type": "error", "error": {"type": kind, "message": "No."}}


def data_of(event: bytes) -> Any:
    (line,) = [line for line in event.decode().splitlines() if line.startswith("data: {")]
    return json.loads(line.removeprefix("data: "))


def test_the_last_event_of_a_stream_is_of_its_protocol() -> None:
    chat, responses, messages = (
        protocols.last_event(path, 400, OPENAI) for path in ("/v1/completions", "/v1/responses", "/v1/messages")
    )
    assert chat == b"data: " + json.dumps(OPENAI).encode() + b"\n\ndata: [DONE]\n\n"
    assert all(event.startswith(b"event: error\ndata: ") and event.endswith(b"\n\n") for event in (responses, messages))
    assert data_of(messages) == protocols.anthropic_error(400, "No.")
    told = data_of(responses)
    assert told["error"] == OPENAI["error"], "what OpenAI's SDKs raise on"
    assert (told["type"], told["message"], told["code"], told["param"]) == ("error", "No.", 400, "model")


def test_what_is_counted_and_what_generates() -> None:
    assert protocols.PROMPTED < protocols.GENERATED
    assert not protocols.GENERATED & protocols.OTHER_KINDS.keys()


@pytest.mark.parametrize(
    ("body", "message"),
    [(b'{"error": {"message": "No."}}', "No."), (b'{"error": 1}', '{"error": 1}'), (b"[]", "[]"), (b"\xff", "\ufffd")],
)
def test_the_sentence_of_any_error(body: bytes, message: str) -> None:
    assert message_of(body) == message
