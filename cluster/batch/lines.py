"""The lines of a batch file: what each asks for, or why it cannot be asked; and the lines that answer them. Pure.

one line of IN --parse--> Request, or a Rejection            OpenAI's Batch API: custom_id, method, url, body
Request + Answer --result_line--> one line of OUT            an answer below status 400
                 --refusal_line--> one line of ERRORS        any other, with the number of the line in IN
Rejection --rejection_line--> one line of ERRORS             the same, without a response
what an engine said --answer_of--> Answer                    JSON, whatever it was

Text of clients comes back as it came, half an emoji too: JSON may name such a lone surrogate (RFC 8259, section 8.2),
UTF-8 has no form of it, so it is written as the escape that it came as. What is nested without end is refused, here and
in answers: Python's parser and writer give up on it at a depth that depends on who calls them.
"""

import hashlib
import json
import reprlib
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pomarium.cluster.http.bodies import BodyError, check_depth

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
MOST_BYTES = 64 << 20
"""Of one line. What is longer is no request but a file of another kind."""
MOST_DEPTH = 200
"""Levels of a line's, or an answer's, JSON."""
MOST_QUOTED = 1000
"""Characters of an answer that is no JSON object."""


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 100


@dataclass(frozen=True)
class Request:
    """Attributes:
    line: its number in IN, from 1. body: JSON.
    """

    line: int
    custom_id: str
    url: str
    body: bytes


@dataclass(frozen=True)
class Rejection:
    """A line that asks for nothing that could be answered.

    Attributes:
        line: its number in IN, from 1. custom_id: None if it has none. code: for programs. message: for people.
    """

    line: int
    custom_id: str | None
    code: str
    message: str


@dataclass(frozen=True)
class Answer:
    """Of an engine: an HTTP status and a JSON body."""

    status: int
    body: bytes

    @property
    def accepted(self) -> bool:
        """Whether it is a result."""
        return self.status < 400


def shown(value: object) -> str:
    """A value of a client for a message: its repr, cut short."""
    return _REPR.repr(value)


def parse(line: int, text: bytes) -> Request | Rejection:
    """What line number `line` asks for.

    Args:
        text: of the line; not blank.
    """
    if len(text) > MOST_BYTES:
        return Rejection(line, None, "line_too_long", f"The line is longer than {MOST_BYTES} bytes.")
    try:
        fields = _shallow(text)
    except ValueError as error:
        return Rejection(line, None, "invalid_json", f"The line is not valid JSON: {error}.")
    if not isinstance(fields, dict):
        return Rejection(line, None, "invalid_json", "The line is not a JSON object.")
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return Rejection(line, None, "missing_custom_id", "`custom_id` must be a string that is not empty.")

    def rejected(code: str, message: str) -> Rejection:
        return Rejection(line, custom_id, code, message)

    if fields.get("method") != "POST":
        return rejected("invalid_method", f"`method` must be POST, not {shown(fields.get('method'))}.")
    url, body = fields.get("url"), fields.get("body")
    if url not in URLS:
        return rejected("invalid_url", f"`url` must be one of {', '.join(URLS)}, not {shown(url)}.")
    if not isinstance(body, dict):
        return rejected("invalid_body", "`body` must be an object.")
    if body.get("stream"):
        return rejected("invalid_body", "`stream` has no meaning in a batch: leave it out.")
    return Request(line, custom_id, url, json.dumps(body).encode())


def answer_of(status: int, body: bytes) -> Answer:
    """What an engine said, as an Answer. What is no JSON object is quoted in one, and no result whatever its status:
    it comes from something between the engine and us, or from a fault of its server."""
    try:
        if isinstance(_shallow(body), dict):
            return Answer(status, body)
    except ValueError:
        pass
    status = HTTPStatus.BAD_GATEWAY.value if status < 400 else status
    text = body.decode(errors="replace")[:MOST_QUOTED]
    return Answer(status, json.dumps({"error": {"message": text, "type": "server_error", "code": status}}).encode())


def duplicate(request: Request) -> Rejection:
    """Of a request whose custom_id an earlier line has."""
    message = f"`custom_id` {shown(request.custom_id)} stands on an earlier line, too."
    return Rejection(request.line, request.custom_id, "duplicate_custom_id", message)


def result_line(request: Request, answer: Answer) -> bytes:
    """The line of OUT."""
    return _line(_answered(request, answer))


def refusal_line(request: Request, answer: Answer) -> bytes:
    """The line of ERRORS for a request that an engine refused."""
    return _line({**_answered(request, answer), "line": request.line})


def rejection_line(rejection: Rejection) -> bytes:
    """The line of ERRORS for one that no engine has seen."""
    error = {"code": rejection.code, "message": rejection.message}
    identity = _id(rejection.custom_id or f"line {rejection.line}")
    fields = {"id": identity, "custom_id": rejection.custom_id, "response": None, "error": error}
    return _line({**fields, "line": rejection.line})


def _answered(request: Request, answer: Answer) -> dict[str, Any]:
    body = json.loads(answer.body)
    response = {"status_code": answer.status, "request_id": body.get("id") or _id(request.custom_id), "body": body}
    return {"id": _id(request.custom_id), "custom_id": request.custom_id, "response": response, "error": None}


def _shallow(text: bytes) -> Any:
    """The JSON value in `text`. Raises ValueError for what is no JSON, or nested deeper than MOST_DEPTH."""
    try:
        value = json.loads(text)
        check_depth(value, MOST_DEPTH + 1)
    except (RecursionError, BodyError):
        raise ValueError(f"it is nested deeper than {MOST_DEPTH} levels") from None
    return value


def _id(identity: str) -> str:
    """The same for the same request whenever it is asked."""
    return f"batch_req_{hashlib.sha256(identity.encode(errors='surrogatepass')).hexdigest()[:24]}"


def _line(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
