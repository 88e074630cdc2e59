"""Requests of every kind whose answers follow from what they ask, and each answer as far as it does: not its id, and
not in which pieces it came."""

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
SCHEMA = {
    "type": "object",
    "properties": {
        "notes": {"type": "array", "minItems": 9, "maxItems": 9, "items": {"type": "string", "maxLength": 20}}
    },
    "required": ["notes"],
    "additionalProperties": False,
}
TOOL = {"name": "write_report", "description": "Writes a report.", "parameters": SCHEMA}
ASKED = [{"role": "user", "content": "Write about Paris."}]
TOOLS = ["--tool-call-parser", "hermes"]
"""For an endpoint of the embedded model, whose template knows no tools: without it calls are refused."""
CHATTED = {"messages": ASKED, "temperature": 0}
TOLD = {"prompt": "Once upon a time", "temperature": 0, "ignore_eos": True}


@dataclass(frozen=True)
class Case:
    """A request. `tokens`: that its answer has at most; the name of their field differs."""

    path: str
    body: Mapping[str, Any]
    limit: str = "max_tokens"

    def whole(self, tokens: int, *, stream: bool) -> dict[str, Any]:
        usage = {"stream_options": {"include_usage": True}} if stream and self.path in (CHAT, COMPLETIONS) else {}
        return {**self.body, self.limit: tokens, "stream": stream, **usage}


CASES = {
    "greedy": Case(COMPLETIONS, TOLD),
    "seeded": Case(COMPLETIONS, TOLD | {"temperature": 1.0, "seed": 7}),
    "penalties": Case(
        COMPLETIONS, TOLD | {"frequency_penalty": 1.5, "presence_penalty": 0.5, "repetition_penalty": 1.1}
    ),
    "logprobs": Case(COMPLETIONS, TOLD | {"logprobs": 2}),
    "choices": Case(COMPLETIONS, TOLD | {"temperature": 1.0, "seed": 7, "n": 2}),
    "stop": Case(COMPLETIONS, TOLD | {"stop": ["zyx"], "min_tokens": 5}),
    "json": Case(COMPLETIONS, {"prompt": "Paris:", "temperature": 0, "structured_outputs": {"json": SCHEMA}}),
    "chat": Case(CHAT, CHATTED | {"ignore_eos": True, "logprobs": True, "top_logprobs": 2}),
    "tools": Case(CHAT, CHATTED | {"tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}),
    "responses": Case(
        RESPONSES, {"input": "Write about Paris.", "temperature": 0, "store": False}, "max_output_tokens"
    ),
    "messages": Case(MESSAGES, {"messages": ASKED, "temperature": 0}),
}


@dataclass
class Asked(threading.Thread):
    """One case, asked on a thread of its own.

    Attributes:
        events: as they came; the one body of an answer that is no stream. ids: of the answer, each as often as it came.
    """

    url: str
    case: Case
    model: str
    tokens: int
    stream: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)
    begun: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    fault: Exception | None = None
    longest_gap_s: float = 0.0

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        body = {"model": self.model, **self.case.whole(self.tokens, stream=self.stream)}
        last = time.monotonic()
        try:
            with httpx.stream("POST", f"{self.url}{self.case.path}", json=body, timeout=300) as answer:
                self.status = answer.status_code
                for event in _events(answer, self.stream and answer.status_code == 200):
                    self.events.append(event)
                    now = time.monotonic()
                    if self.begun.is_set():
                        self.longest_gap_s = max(self.longest_gap_s, now - last)
                    last = now
                    self.begun.set()
        except httpx.HTTPError as error:
            self.fault = error

    @property
    def answer(self) -> dict[str, Any]:
        """What the request determines of its answer."""
        if self.fault is not None or self.status != 200:
            return {"fault": repr(self.fault), "status": self.status, "events": self.events}
        if not self.stream:
            return {"whole": _determined(self.events[0])}
        return joined(self.events)


def _events(answer: httpx.Response, stream: bool) -> Iterator[dict[str, Any]]:
    if not stream:
        yield json.loads(answer.read())
        return
    for line in answer.iter_lines():
        if line == "data: [DONE]":
            yield {"done": True}
        elif line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


DRAWN = frozenset({"id", "created", "created_at", "item_id", "call_id", "tool_call_id", "signature", "sequence_number"})
CACHE = frozenset({"cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"})
UNDETERMINED = DRAWN | CACHE


def _determined(value: Any) -> Any:
    """`value` without what is drawn or depends on the time."""
    if isinstance(value, dict):
        return {k: _determined(v) for k, v in value.items() if k not in UNDETERMINED}
    return [_determined(one) for one in value] if isinstance(value, list) else value


def parted(value: Any) -> tuple[Any, list[float]]:
    """`value` without its floating-point numbers, and these: batches change their last digits."""
    numbers: list[float] = []

    def without(one: Any) -> Any:
        if isinstance(one, float):
            numbers.append(one)
            return 0.0
        if isinstance(one, dict):
            return {k: without(v) for k, v in one.items()}
        return [without(v) for v in one] if isinstance(one, list) else one

    return without(value), numbers


def drawn(events: list[dict[str, Any]]) -> dict[str, int]:
    """How many values each of DRAWN has: of an answer that two engines gave, as many as of one engine's."""
    seen: dict[str, set[str]] = {}

    def look(value: Any) -> None:
        if isinstance(value, dict):
            for key, one in value.items():
                if key in DRAWN:
                    seen.setdefault(key, set()).add(str(one))
                look(one)
        elif isinstance(value, list):
            for one in value:
                look(one)

    look(events)
    return {key: len(values) for key, values in seen.items()}


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Events with what comes in pieces as one: strings are joined and lists appended, whatever their names."""
    found: dict[str, Any] = {"drawn": {k: v for k, v in drawn(events).items() if k != "sequence_number"}}
    numbers = [e["sequence_number"] for e in events if "sequence_number" in e]
    assert numbers == list(range(len(numbers))), numbers
    for event in events:
        kind = event.get("type", "")
        if "delta" in event and isinstance(event["delta"], str):
            found[kind] = found.get(kind, "") + event["delta"]
        else:
            _join(found.setdefault(kind, {}), _determined({k: v for k, v in event.items() if k != "type"}))
    return found


def _join(into: dict[str, Any], event: Mapping[str, Any]) -> None:
    for key, value in event.items():
        if isinstance(value, str) and key in ("text", "content", "arguments", "partial_json", "reasoning", "thinking"):
            into[key] = into.get(key, "") + value
        elif isinstance(value, dict):
            inner = into.get(key)
            _join(into.setdefault(key, {}) if not isinstance(inner, dict) else inner, value)
        elif isinstance(value, list) and key in ("choices", "tool_calls"):
            places = into.setdefault(key, {})
            for one in value:
                _join(places.setdefault(one.get("index", 0), {}), one)
        elif isinstance(value, list):
            into[key] = [*into.get(key, []), *value]
        elif value is not None:
            into.setdefault(key, []).append(value) if key in ("finish_reason", "done") else into.update({key: value})


def ask_all(url: str, model: str, tokens: int, *, stream: bool) -> dict[str, Asked]:
    """All cases at once, by name; streams have begun."""
    asked = {name: Asked(url, case, model, tokens, stream) for name, case in CASES.items()}
    for one in asked.values():
        one.start()
    for name, one in asked.items():
        assert not stream or one.begun.wait(120), (name, one.answer)
    return asked


def answers_of(asked: Mapping[str, Asked]) -> dict[str, dict[str, Any]]:
    """What they are answered in the end."""
    for one in asked.values():
        one.join(300)
    return {name: one.answer for name, one in asked.items()}


def all_good(answers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """`answers`, none of which is a refusal: those would be the same whatever happens."""
    assert not {name: answer for name, answer in answers.items() if "fault" in answer}
    return answers


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for name, answer in found.items():
        (form, numbers), (other, other_numbers) = parted(answer), parted(expected[name])
        assert form == other, name
        assert len(numbers) == len(other_numbers), name
        assert all(abs(one - two) < 1e-3 for one, two in zip(numbers, other_numbers, strict=True)), name
