"""What the lines of a batch file ask for, and the lines that answer them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.batch import lines
from pomarium.cluster.batch.lines import Answer, Rejection, Request, parse
from pomarium.cluster.batch.progress import Tally

GOOD: dict[str, Any] = {
    "custom_id": "r1",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "a", "max_tokens": 1},
}


def text(**changes: Any) -> bytes:
    return json.dumps({**GOOD, **changes}).encode() + b"\n"


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels - 1):
        value = [value]
    return value


def test_a_request() -> None:
    asked = parse(7, text())
    assert isinstance(asked, Request)
    assert (asked.line, asked.custom_id, asked.url) == (7, "r1", "/v1/completions")
    assert json.loads(asked.body) == GOOD["body"]


@pytest.mark.parametrize("url", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_what_a_line_may_ask(url: str) -> None:
    asked = parse(1, text(url=url))
    assert isinstance(asked, Request)
    assert asked.url == url


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 8, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 6}},
        {"input_tokens": 8, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 6}},
    ],
)
def test_tokens_are_counted_whatever_they_are_called(usage: dict[str, Any]) -> None:
    tally = Tally()
    tally.add(Answer(200, json.dumps({"usage": usage}).encode()))
    assert (tally.prompt, tally.generated, tally.cached) == (8, 2, 6)


@pytest.mark.parametrize(
    ("line", "custom_id", "code"),
    [
        (b"{broken", None, "invalid_json"),
        (b"\xff\xfe", None, "invalid_json"),
        (b"[" * 100_000, None, "invalid_json"),
        (text(body={"prompt": nested(lines.MOST_DEPTH)}), None, "invalid_json"),
        (text(method=nested(lines.MOST_DEPTH - 1)), "r1", "invalid_method"),
        (b"[1]", None, "invalid_json"),
        (text(custom_id=None), None, "missing_custom_id"),
        (text(custom_id=""), None, "missing_custom_id"),
        (text(custom_id=5), None, "missing_custom_id"),
        (text(method="GET"), "r1", "invalid_method"),
        (text(url="/v1/embeddings"), "r1", "invalid_url"),
        (text(url=["/v1/completions"]), "r1", "invalid_url"),
        (text(body="a"), "r1", "invalid_body"),
        (text(body={"stream": True}), "r1", "invalid_body"),
    ],
)
def test_a_line_that_asks_for_nothing(line: bytes, custom_id: str | None, code: str) -> None:
    asked = parse(3, line)
    assert isinstance(asked, Rejection)
    assert (asked.line, asked.custom_id, asked.code) == (3, custom_id, code)
    written = json.loads(lines.rejection_line(asked))
    assert (written["custom_id"], written["line"], written["response"]) == (custom_id, 3, None)
    assert written["error"] == {"code": code, "message": asked.message}


def test_a_line_of_another_kind_of_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_BYTES", 10)
    assert parse(1, text()) == Rejection(1, None, "line_too_long", "The line is longer than 10 bytes.")


@given(st.binary(max_size=200))
def test_no_line_raises(line: bytes) -> None:
    parse(1, line)


TEXT = st.text(st.characters(exclude_categories=()))
"""With lone surrogates, which JSON can name and UTF-8 cannot hold."""


@given(TEXT.filter(bool), st.dictionaries(TEXT, st.integers() | TEXT | st.none()))
def test_whatever_it_is_called(custom_id: str, body: dict[str, Any]) -> None:
    body.pop("stream", None)
    asked = parse(1, text(custom_id=custom_id, body=body))
    assert isinstance(asked, Request)
    assert (asked.custom_id, json.loads(asked.body)) == (custom_id, body)
    assert json.loads(lines.rejection_line(lines.duplicate(asked)))["custom_id"] == custom_id
    line = lines.result_line(asked, Answer(200, b'{"id": "cmpl-1", "choices": []}'))
    assert line.count(b"\n") == 1, "a result is one line"
    written = json.loads(line)
    assert written["custom_id"] == custom_id
    assert written["response"] == {"status_code": 200, "request_id": "cmpl-1", "body": {"id": "cmpl-1", "choices": []}}
    assert written["error"] is None


def test_a_refused_request_has_its_line_and_the_answer() -> None:
    asked = parse(12, text())
    assert isinstance(asked, Request)
    written = json.loads(lines.refusal_line(asked, Answer(400, b'{"error": {"message": "too long"}}')))
    assert (written["line"], written["response"]["status_code"]) == (12, 400)
    assert written["response"]["body"] == {"error": {"message": "too long"}}


def test_ids_are_the_same_whenever_a_request_is_asked() -> None:
    asked = parse(1, text())
    assert isinstance(asked, Request)
    first, second = (json.loads(lines.result_line(asked, Answer(200, b"{}"))) for _ in range(2))
    assert first == second
    assert first["id"].startswith("batch_req_")


def test_half_an_emoji_comes_back_as_it_came_and_all_else_as_utf_8() -> None:
    asked = parse(1, b'{"custom_id": "\\ud83d caf\xc3\xa9", "method": "POST", "url": "/v1/completions", "body": {}}')
    assert isinstance(asked, Request)
    assert b'"custom_id": "\\ud83d caf\xc3\xa9"' in lines.result_line(asked, Answer(200, b"{}"))


@pytest.mark.parametrize("depth", [1, 50, lines.MOST_DEPTH - 1])
def test_what_is_nested_within_bounds_is_asked(depth: int) -> None:
    asked = parse(1, text(body={"prompt": nested(depth - 1) if depth > 1 else "a"}))
    assert isinstance(asked, Request)


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"[1]", b"\xff", b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000]
)
@pytest.mark.parametrize("status", [200, 404, 500])
def test_an_answer_that_is_no_object_is_an_error_of_its_line(status: int, body: bytes) -> None:
    asked = parse(3, text())
    assert isinstance(asked, Request)
    answer = lines.answer_of(status, body)
    assert not answer.accepted
    assert answer.status == (502 if status == 200 else status)
    response = json.loads(lines.refusal_line(asked, answer))["response"]
    assert response["body"]["error"]["message"] == body.decode(errors="replace")[: lines.MOST_QUOTED]


def test_an_answer_that_is_an_object_stays_as_it_is() -> None:
    assert lines.answer_of(200, b'{"id": "\\ud83d"}') == Answer(200, b'{"id": "\\ud83d"}')
