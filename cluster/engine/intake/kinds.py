"""Lists and objects of a request that vLLM walks through before it has looked whether they are any. Pure.

What checks the form of a request (forms.py tells of it) runs behind validators of vLLM's own, which raise TypeError,
AttributeError or KeyError on the values that are refused here: a 500, or a sentence of Python's. Bodies are of bounded
depth (http/bodies.py).
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pomarium.cluster.engine.intake.forms import shown

_KINDS: dict[str, type] = {
    "messages": list,
    "tools": list,
    "structured_outputs": dict,
    "stream_options": dict,
    "response_format": dict,
}
_NEEDED = frozenset({"messages"})
"""Must not be null. All others may be."""

_WORDS: dict[type, str] = {list: "a list", dict: "an object", str: "a text"}


def refusal(fields: Mapping[str, Any]) -> str | None:
    """What is of another kind than it has to be; None: nothing is."""
    return next(_wrong(fields), None)


def _wrong(fields: Mapping[str, Any]) -> Iterator[str]:
    for name, kind in _KINDS.items():
        if name in fields and not (fields[name] is None and name not in _NEEDED):
            yield from _unless(kind, name, fields[name])
    for name in ("messages", "tools"):
        for i, item in enumerate(fields.get(name) or ()):
            yield from _wrong_in(f"{name}[{i}]", item)


def _wrong_in(place: str, item: Any) -> Iterator[str]:
    """Of a message, a tool, or a part of a message's content, which may have parts itself."""
    yield from _unless(dict, place, item)
    if not isinstance(item, dict):
        return
    if item.get("tool_calls") is not None:
        yield from _unless(list, f"{place}.tool_calls", item["tool_calls"])
    if item.get("type") == "text":
        if item.get("text") is None:
            yield f"`{place}` lacks `text`."
        yield from _unless(str, f"{place}.text", item.get("text"))
    parts = item.get("content")
    for i, part in enumerate(parts if isinstance(parts, list) else ()):
        yield from _wrong_in(f"{place}.content[{i}]", part)


def _unless(kind: type, place: str, value: Any) -> Iterator[str]:
    if not isinstance(value, kind):
        yield f"`{place}` must be {_WORDS[kind]}, not {shown(value)}."
