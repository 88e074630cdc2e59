"""The images in a request's messages: how much of its body they are. Pure.

    messages, input: content: parts --> {"type": "image_url", "image_url": {"url": ...}}        chat
                                        {"type": "input_image", "image_url": ...}                Responses
                                        {"type": "image", "source": {"data": ...}}               Messages
                                        {"type": "tool_result", "content": parts}                Messages, within

No tokenizer reads them, so they are no part of a request's text (texts.py). What stands elsewhere is: a chat template
may write all of it into the prompt.
"""

from collections.abc import Iterator, Mapping
from typing import Any

_SOURCES = {"image_url": ("image_url", "url"), "input_image": ("image_url", "url"), "image": ("source", "data")}
"""Type of a part -> where its image is; what stands for the object itself is the image, too."""
_DATA = "data:"


def chars_of(fields: Mapping[str, Any]) -> int:
    """Characters of the images that the request brings in its body."""
    return sum(map(len, _images(fields)))


def _images(fields: Mapping[str, Any]) -> Iterator[str]:
    for field in ("messages", "input"):
        items = fields.get(field)
        for item in items if isinstance(items, list) else ():
            if isinstance(item, dict):
                for part in _parts(item):
                    yield from _image(part)


def _parts(item: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Parts of a message, or of an output of a tool, and those within results of tools, one level deep."""
    for field in ("content", "output"):
        content = item.get(field)
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                yield part
                inner = part.get("content") if part.get("type") == "tool_result" else None
                yield from (each for each in (inner if isinstance(inner, list) else ()) if isinstance(each, dict))


def _image(part: Mapping[str, Any]) -> Iterator[str]:
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _SOURCES:
        return
    outer, inner = _SOURCES[kind]
    found = part.get(outer)
    if isinstance(found, dict):
        found = found.get(inner)
        if isinstance(found, str) and (inner == "data" or found[:5].lower() == _DATA):
            yield found
    elif isinstance(found, str) and found[:5].lower() == _DATA:
        yield found
