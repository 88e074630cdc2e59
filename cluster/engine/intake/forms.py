"""What is wrong with the form of a request, one sentence: of all that pydantic says of it, what its sender meant. Pure.

    errors of pydantic, the body --_tree--> nodes, along the body's own keys and the alternatives of unions
                                 --_best--> one Fault: its place in the body, and a sentence on it

Of a union pydantic tells what each of its alternatives lacks: 230 errors for an item without its content. The one that
was meant is the one whose `type` or `role` fits, and then the one that lacks least; where none fits, it is told which
would. The types of errors are pydantic's (docs.pydantic.dev, "Validation errors").
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pomarium.cluster.http import bodies

DISCRIMINATORS = frozenset({"type", "role", "author"})
"""Fields that say which alternative of a union an object is."""

SHOWN = 60
"""Characters of a wrong value that are repeated."""

_KINDS = {
    "string": "a text",
    "list": "a list",
    "iterable": "a list",
    "tuple": "a list",
    "dict": "an object",
    "model": "an object",
    "dataclass": "an object",
    "mapping": "an object",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}
"""What is expected, by the first word of an error's type, as in `string_type`, `int_parsing`."""

_FORMS = ("_type", "_parsing", "_attributes_type", "_from_float", "_parsing_size")
_CHOICES = frozenset({"literal_error", "enum"})
_MISSING = "missing"
_SHOULD = "Input should be "
_QUOTED = re.compile(r"'[^']*'")


@dataclass(frozen=True)
class Fault:
    """Attributes:
    place: of the value in the body, such as `messages[0].role`; "" is the body itself. sentence: on it, whole.
    """

    place: str
    sentence: str


@dataclass
class _Node:
    """A value of the body, as one alternative of a union takes it.

    Attributes:
        errors: of the value itself. fields: of what is in it. ways: of unions, the alternatives for this same value.
    """

    place: str
    value: Any
    errors: list[Mapping[str, Any]] = field(default_factory=list)
    fields: dict[str | int, "_Node"] = field(default_factory=dict)
    ways: dict[str | int, "_Node"] = field(default_factory=dict)


def fault(errors: Sequence[Mapping[str, Any]], body: Any) -> Fault:
    """The one fault to tell of.

    Args:
        errors: pydantic's, at least one. Their `loc` begins at the body, or at a list somewhere in it.
        body: as it was sent, parsed.
    """
    place, value = _root(errors, body)
    root = _Node(place, value)
    for error in errors:
        _add(root, error)
    return _best(root)


def _root(errors: Iterable[Mapping[str, Any]], body: Any) -> tuple[str, Any]:
    """Where the errors' places begin: what is checked late is told without the way to it, from its own value on."""
    for error in errors:
        first, *rest = error["loc"] or ("",)
        if isinstance(first, int) and not isinstance(body, list):
            held = (found for found in bodies.walked(body) if _holds(found[0], first, rest, error))
        elif error["type"] == _MISSING and not rest and error["input"] != body:
            held = (found for found in bodies.walked(body) if found[0] == error["input"])
        else:
            continue
        for value, path in held:
            return _joined(path), value
    return "", body


def _holds(value: Any, at: int, rest: Sequence[Any], error: Mapping[str, Any]) -> bool:
    """Whether an error is of the item `at` of this list, or of a field of it."""
    if not isinstance(value, list) or at >= len(value):
        return False
    item = value[at]
    own = item.get(rest[-1]) if rest and isinstance(item, dict) and error["type"] != _MISSING else None
    return error["input"] in (item, own) and error["input"] is not None


def _add(node: _Node, error: Mapping[str, Any]) -> None:
    for key in error["loc"]:
        inner = _inside(node.value, key)
        if inner or (error["type"] == _MISSING and key == error["loc"][-1]):
            place = _joined([key], node.place)
            node = node.fields.setdefault(key, _Node(place, inner[0] if inner else None))
        else:
            node = node.ways.setdefault(key, _Node(node.place, node.value))
    node.errors.append(error)


def _inside(value: Any, key: str | int) -> tuple[Any] | None:
    if isinstance(value, dict):
        return (value[key],) if key in value else None
    return (value[key],) if isinstance(value, list) and isinstance(key, int) and key < len(value) else None


def _joined(path: Iterable[str | int], place: str = "") -> str:
    for key in path:
        place += f"[{key}]" if isinstance(key, int) else f".{key}" if place else key
    return place


def _best(node: _Node) -> Fault:
    """Of a value whose errors, fields and alternatives are known."""
    if node.fields:
        return _of_fields(node)
    if not node.ways:
        return _of_value(node.place, node.value, node.errors)
    level, _ = min(map(_distance, node.ways.values()))
    nearest = [way for way in node.ways.values() if _distance(way)[0] == level]
    if level in (_FITS, _NOTHING) or len(nearest) == 1:
        return _best(min(nearest, key=_distance))
    if level == _ANOTHER:
        return _of_discriminators(nearest)
    return _of_value(node.place, node.value, [*node.errors, *(error for way in nearest for error in _own(way))])


_FITS, _ANOTHER, _NOTHING, _NO_KIND = range(4)
"""How far a value is from an alternative: it lacks something; `type` or `role` names another; names none; it is of
another kind, such as a text where a list should be."""


def _distance(way: _Node) -> tuple[int, int]:
    """With the number of what is wrong there."""
    if way.ways:
        return min(map(_distance, way.ways.values()))
    if way.errors:
        chosen = any(error["type"] in _CHOICES for error in way.errors) and not isinstance(way.value, dict | list)
        return (_ANOTHER if chosen else _NO_KIND), len(way.errors)
    named = [inner for key, inner in way.fields.items() if key in DISCRIMINATORS]
    if any(error["type"] != _MISSING for inner in named for error in _own(inner)):
        return _ANOTHER, len(way.fields)
    return (_NOTHING if named else _FITS), len(way.fields)


def _own(node: _Node) -> list[Mapping[str, Any]]:
    """Errors of the value itself, whatever alternative they are of."""
    return [*node.errors, *(error for way in node.ways.values() for error in _own(way))]


def _of_fields(node: _Node) -> Fault:
    """Of an object or list: what says what it is comes first, then what it lacks."""
    wrong = sorted(node.fields.items(), key=lambda item: item[0] not in DISCRIMINATORS)
    missing = [str(key) for key, inner in wrong if any(error["type"] == _MISSING for error in inner.errors)]
    if missing and (wrong[0][0] not in DISCRIMINATORS or wrong[0][0] in missing):
        return _lacking(node.place, missing)
    return _best(wrong[0][1])


def _of_discriminators(ways: Sequence[_Node]) -> Fault:
    """Of a value that is none of the alternatives, by what says which it is: in the field that most have."""
    found: dict[str, tuple[Any, list[Mapping[str, Any]]]] = {}
    for way in ways:
        nodes = [way] if way.errors else [inner for key, inner in way.fields.items() if key in DISCRIMINATORS]
        for inner in nodes or [min(way.ways.values(), key=_distance)]:
            found.setdefault(inner.place, (inner.value, []))[1].extend(e for e in _own(inner) if e["type"] != _MISSING)
    place, (value, errors) = max(found.items(), key=lambda item: len(item[1][1]))
    return _of_value(place, value, errors)


def _lacking(place: str, names: Sequence[str]) -> Fault:
    *first, last = (f"`{name}`" for name in names)
    listed = f"{', '.join(first)} and {last}" if first else last
    whole = _joined([names[0]], place)
    return Fault(whole, f"{_named(place)} lacks {listed}.")


def _of_value(place: str, value: Any, errors: Sequence[Mapping[str, Any]]) -> Fault:
    expected = list(dict.fromkeys(one for error in errors for one in _expected(error)))
    if expected:
        *first, last = expected
        listed = f"{', '.join(first)} or {last}" if first else last
        return Fault(place, f"{_named(place)} must be {listed}, not {shown(value)}.")
    said = str(errors[0]["msg"]).removeprefix("Value error, ").removesuffix(".")
    return Fault(place, f"{_named(place)} is refused: {said}.")


def _expected(error: Mapping[str, Any]) -> list[str]:
    """What the value should have been; nothing: that is not known, only what is wrong with it."""
    kind, said = error["type"], error["msg"]
    if kind in _CHOICES:
        return _QUOTED.findall(error["ctx"]["expected"]) or [error["ctx"]["expected"]]
    known = _KINDS.get(kind.partition("_")[0]) if kind.endswith(_FORMS) else None
    if known is not None:
        return [known]
    return [said.removeprefix(_SHOULD)] if said.startswith(_SHOULD) else []


def _named(place: str) -> str:
    return f"`{place}`" if place else "The request"


def shown(value: Any) -> str:
    """A wrong value, as a sentence names it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
