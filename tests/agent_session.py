"""A coding agent's session of twenty turns, written in the forms that Claude Code and Codex send, and replayed.

    turn --request: Messages or Responses--> POST, streamed --usage of the last event--> Turn: tokens, and those cached

What an agent changes from turn to turn although the conversation only grows is changed here too: headers, the line with
a checksum before the system prompt, the marks of what to cache. What it answered is written down, so the model's own
answers do not count.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

TURNS = 20
SYSTEM = "You are a coding agent. Read before you write, and run the tests before you say that they pass. " * 18
TASK = "The parser fails on empty lines. Find out why, and correct it."
REMINDER = "<system-reminder>The list of tasks is empty. Do not mention this.</system-reminder>"
SCHEMA = {"type": "object", "properties": {"path": {"type": "string"}}, "required": ["path"]}
DESCRIPTION = "Reads a file of the project"
MARK = {"cache_control": {"type": "ephemeral"}}


ENOUGH = 0.95
"""Of the tokens of a turn the next one finds at least so many in the cache."""


@dataclass(frozen=True)
class Turn:
    """What an engine told of one. tokens: of the prompt. cached: of these, found in the cache: its blocks are whole, so
    the first token that differed from what was cached is in the block that begins there."""

    tokens: int
    cached: int


def checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:5]


def result(turn: int) -> str:
    return f"{turn} def line_{turn}(text):\n    return text.split({turn})\n"


def claude_code(turn: int) -> dict[str, Any]:
    """The body of a request of Claude Code's after `turn` calls of a tool."""
    said: list[dict[str, Any]] = [{"role": "user", "content": [text(REMINDER), text(TASK)]}]
    for i in range(turn):
        call = {"type": "tool_use", "id": f"toolu_{i:02}", "name": "Read", "input": {"path": f"src/part_{i}.py"}}
        came = {"type": "tool_result", "tool_use_id": f"toolu_{i:02}", "content": result(i)}
        said += [
            {"role": "assistant", "content": [text(f"I read part {i}."), call]},
            {"role": "user", "content": [came]},
        ]
    said[-1]["content"][-1] |= MARK
    billing = f"x-anthropic-billing-header: cc_version=2.1.38.a1b; cc_entrypoint=cli; cch={checksum(f'{turn}')};"
    return {
        "max_tokens": 2,
        "metadata": {"user_id": "user_1"},
        "system": [text(billing), text("You are Claude Code.") | MARK, text(SYSTEM) | MARK],
        "tools": [{"name": "Read", "description": DESCRIPTION, "input_schema": SCHEMA}],
        "messages": said,
        "stream": True,
    }


def codex(turn: int) -> dict[str, Any]:
    """The body of a request of Codex's after `turn` calls of a tool."""
    items: list[dict[str, Any]] = [message("developer", "Ask before you write."), message("user", TASK)]
    for i in range(turn):
        arguments = json.dumps({"path": f"src/part_{i}.py"})
        items += [
            {"type": "function_call", "name": "read", "arguments": arguments, "call_id": f"call_{i:02}"},
            {"type": "function_call_output", "call_id": f"call_{i:02}", "output": result(i)},
        ]
    return {
        "instructions": SYSTEM,
        "input": items,
        "tools": [
            {"type": "function", "name": "read", "description": DESCRIPTION, "strict": False, "parameters": SCHEMA}
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "store": False,
        "stream": True,
        "include": [],
        "prompt_cache_key": "session-1",
        "max_output_tokens": 2,
    }


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def message(role: str, content: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": [{"type": "input_text", "text": content}]}


FORMS = {"/v1/messages": claude_code, "/v1/responses": codex}


def replayed(url: str, key: str, model: str) -> dict[str, list[Turn]]:
    """Both sessions, a turn of one after a turn of the other, by path."""
    found: dict[str, list[Turn]] = {path: [] for path in FORMS}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as client:
        for turn in range(TURNS):
            for path, form in FORMS.items():
                headers = {"x-api-key": key, "x-request-id": f"{path}-{turn}", "session-id": checksum(f"{path}{turn}")}
                with client.stream("POST", path, json={"model": model, **form(turn)}, headers=headers) as answer:
                    body = "\n".join(answer.iter_lines())
                assert answer.status_code == 200, body
                found[path].append(used(body))
    return found


def shares(turns: list[Turn]) -> list[float]:
    """Of the tokens of each turn but the last, how many the next one found in the cache."""
    return [later.cached / before.tokens for before, later in pairwise(turns)]


def told(path: str, turns: list[Turn]) -> str:
    """A line for each turn: where it left what was cached, and of how much of the turn before that is; who lost it."""
    lines = []
    for index, (turn, share) in enumerate(zip(turns, [None, *shares(turns)], strict=True)):
        of = "" if share is None else f", {share:.1%} of the last turn"
        lost = " LOST" if share is not None and share < ENOUGH else ""
        differs = f"differs from token {turn.cached} on" if turn.cached < turn.tokens else "all cached"
        lines.append(f"{path} turn {index:2}: {turn.tokens:5} tokens, {differs}{of}{lost}")
    return "\n".join(lines)


def used(body: str) -> Turn:
    """What the last event of a stream says."""
    usage = [
        found for event in events(body) if (found := event.get("usage") or (event.get("response") or {}).get("usage"))
    ]
    last = usage[-1]
    if "input_tokens_details" in last:
        return Turn(last["input_tokens"], last["input_tokens_details"]["cached_tokens"])
    cached = last.get("cache_read_input_tokens", 0)
    return Turn(last["input_tokens"] + cached + last.get("cache_creation_input_tokens", 0), cached)


def events(body: str) -> Iterator[dict[str, Any]]:
    for line in body.splitlines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))
