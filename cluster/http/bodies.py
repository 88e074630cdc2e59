"""What a client sent, as parsed JSON that everything behind can take: one object, of bounded depth, all of it text.

    bytes --parsed--> dict, or BodyError: what is wrong, and where

Python's JSON reader takes more than that, and what it takes breaks elsewhere: nesting meets the limit of recursion in
whatever walks through it (RecursionError, which is no ValueError); half of a surrogate pair (text that JavaScript cut
inside an emoji; RFC 8259, section 8.2, leaves open what becomes of it) cannot be encoded; `NaN` is no JSON; an
integer beyond 64 bits passes no message between processes. Whoever takes a body asks here, once, before anything else.
Imports only the standard library.

Costs what the reader costs, and a walk over the value only where the text has brackets or escapes that could be at
fault: 7 ms per MB of text, 20 ms per MB of token ids.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from pomarium.worker.errors import PomariumError

DEPTH = 128
"""Objects and arrays within each other. Of the requests of OpenAI's protocol only schemas nest at all, by two for each
object in an object; what walks through them takes up to three of Python's 1,000 calls a level."""

LARGE = 256 << 10
"""Bytes of a body that takes longer to parse than to hand to a thread: some 2 ms."""

_LONG = re.compile(r"\d{19}")
"""Digits of which some numbers need more than 64 bits."""

SHOWN = 60
"""Characters of a place that are shown: keys are the client's and may be of any length."""


class BodyError(PomariumError):
    """A body that is refused. `reason` follows a name of it: "The request body" + " " + reason + "."."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The request body {reason}.")
        self.reason = reason


def parsed(body: bytes | str) -> dict[str, Any]:
    """The JSON object in `body`.

    Raises:
        BodyError: it is no JSON, no object, nested deeper than DEPTH, has half of a surrogate pair in its text, or an
            integer of more than 64 bits.
    """
    text = _text(body)
    try:
        fields = json.loads(text, parse_constant=refuse_constant)
    except ValueError as error:
        raise BodyError(f"is not valid JSON: {error}") from None
    except RecursionError:
        raise BodyError(_too_deep("")) from None
    if not isinstance(fields, dict):
        raise BodyError("is not valid JSON: it must be an object")
    if text.count("[") + text.count("{") > DEPTH:
        check_depth(fields)
    if "\\ud" in text or "\\uD" in text or _LONG.search(text):
        check_values(fields)
    return fields


def check_depth(value: Any, limit: int = DEPTH) -> None:
    """Raises BodyError if objects and arrays are nested deeper than `limit`. Does not recurse."""
    level = [value]
    for _ in range(limit):
        level = [inner for container in level for _, inner in _entries(container) if isinstance(inner, dict | list)]
        if not level:
            return
    del level
    deep = (path for inner, path in walked(value) if len(path) == limit and isinstance(inner, dict | list))
    raise BodyError(_too_deep(_place(next(deep)), limit))


def check_values(value: Any) -> None:
    """Raises BodyError for half of a surrogate pair in a text or key, or an integer that msgpack has no room for: it
    takes -2**63 to 2**64 - 1. Does not recurse."""
    for item, path in walked(value):
        if isinstance(item, str):
            if not _encodable(item):
                raise BodyError(_half(_place(path)))
        elif isinstance(item, dict):
            if not all(map(_encodable, item)):
                raise BodyError(_half(_place(path), "a key of "))
        elif isinstance(item, int) and not -(2**63) <= item < 2**64:
            raise BodyError(f"has an integer of more than 64 bits in `{_shown(_place(path))}`: make it smaller")


def walked(value: Any) -> Iterator[tuple[Any, list[str | int]]]:
    """All that is in `value`, itself first, with the way there, which is read before the walk goes on: a body may have
    millions of values, and a place is shown of one at most."""
    path: list[str | int] = []
    yield value, path
    entered = [_entries(value)]
    while entered:
        entry = next(entered[-1], None)
        if entry is None:
            entered.pop()
            if path:
                path.pop()
            continue
        key, inner = entry
        path.append(key)
        yield inner, path
        if isinstance(inner, dict | list):
            entered.append(_entries(inner))
        else:
            path.pop()


def _entries(value: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(value, dict):
        return iter(value.items())
    return enumerate(value) if isinstance(value, list) else iter(())


def _text(body: bytes | str) -> str:
    if isinstance(body, str):
        return body
    try:
        return body.decode(json.detect_encoding(body))
    except UnicodeDecodeError as error:
        raise BodyError(f"is not valid JSON: it is not {error.encoding.upper()} at byte {error.start}") from None


def refuse_constant(name: str) -> Any:
    """json.loads's `parse_constant`: NaN and the infinities are Python's, not JSON's. Raises ValueError."""
    raise ValueError(f"{name} is no JSON number")


def _place(path: Iterable[str | int]) -> str:
    place = ""
    for key in path:
        if len(place) > SHOWN:  # what follows is not shown anyhow
            break
        name = f"[{key}]" if isinstance(key, int) else key[:SHOWN]
        place += f".{name}" if place and isinstance(key, str) else name
    return place


def _encodable(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(place: str) -> str:
    whole = place if len(place) <= SHOWN else f"{place[:SHOWN]}..."
    return whole.encode("ascii", "backslashreplace").decode()


def _half(place: str, what: str = "") -> str:
    where = f"{what}`{_shown(place)}`" if place else f"{what}itself"
    return f"has half of a surrogate pair in {where}: a character was cut in two, so leave it out or send it whole"


def _too_deep(place: str, limit: int = DEPTH) -> str:
    where = f" in `{_shown(place)}`" if place else ""
    return f"is nested deeper than {limit} levels{where}: send it flatter"
