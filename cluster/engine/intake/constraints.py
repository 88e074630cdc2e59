"""The form that a client wants its answer in: found in a request, and bounded before anything compiles it. Pure.

    body --of_body--> Constraint, ... --refusal--> None, or a sentence      (guard.py, for each HTTP request)
    StructuredOutputsParams --of_params--> Constraint                       (request_check.py, for each engine request)

Grammars, expressions and schemas are programs for a compiler, and small ones can be large: `"minItems": 100000000` is
25 bytes and 6 GB. llguidance, which compiles them (grammars.py), bounds its own work except where it expands numbers.
These are bounded here, with text and subschemas; the worst that is let through takes about a second and 100 MB.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from math import isfinite, lcm
from typing import Any

from pomarium.cluster.http.bodies import DEPTH, BodyError, check_depth, refuse_constant

JSON_CHARS = 65_536
TEXT_CHARS = 16_384
"""Characters of a schema, choice or structural tag as compact JSON, and of an expression or grammar."""

SUBSCHEMAS = 1_000
"""Objects in a schema. 1,000 optional properties take 0.8 s to compile, 5,000 take 8 s."""

ITEMS = 10_000
"""Sum of the bounds on items, each of which becomes a rule."""

MULTIPLES = 10_000
"""Least common multiple of all `multipleOf`, as integers: the states of a division that meets all of them."""

REPEATS = 1_000_000
"""Highest count of a repetition in an expression or grammar."""

_COUNTED = frozenset({"minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains"})
_REPEAT = re.compile(r"\{([\d\s,]+)\}", re.ASCII)
_NUMBER = re.compile(r"0*(\d+)", re.ASCII)


class Kind(StrEnum):
    """vLLM's field of StructuredOutputsParams."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"
    STRUCTURAL_TAG = "structural_tag"


@dataclass(frozen=True)
class Constraint:
    """One form that is asked for.

    Attributes:
        text: the expression or grammar; for the other kinds JSON, as the compilers take it.
        param: the field of the request that it stands in.
    """

    kind: Kind
    text: str
    param: str


def of_body(fields: Mapping[str, Any]) -> tuple[Constraint, ...]:
    """The constraints that stand in a body of OpenAI's protocols, Anthropic's or vLLM's additions, well-formed or not:
    whoever reads them next decides that. Parameters of tools count where the answer has to be a call."""
    return (
        *_of_format(fields.get("response_format")),
        *_of_flat_format(fields.get("text"), "text"),
        *_of_flat_format(fields.get("output_config"), "output_config"),
        *_of_outputs(fields),
        *_of_tools(fields),
    )


def of_params(params: Any) -> Constraint | None:
    """The constraint of vLLM's StructuredOutputsParams, as its compiler gets it; None for any JSON object."""
    for kind in Kind:
        value = getattr(params, kind.value)
        if value is not None:
            return Constraint(kind, _as_text(value), f"structured_outputs.{kind}")
    return None


def refusal(constraint: Constraint) -> str | None:
    """Why `constraint` is not compiled; None: it is small enough."""
    if constraint.kind in (Kind.REGEX, Kind.GRAMMAR):
        return _refusal_of_text(constraint)
    if len(constraint.text) > JSON_CHARS:
        return f"`{constraint.param}` has {len(constraint.text)} characters: {JSON_CHARS} are the most, so shorten it."
    try:
        value = json.loads(constraint.text, parse_constant=refuse_constant)
        check_depth(value)
    except (BodyError, RecursionError):
        return f"`{constraint.param}` is nested deeper than {DEPTH} levels: use `$defs`, or flatten it."
    except ValueError as error:
        return f"`{constraint.param}` is not valid JSON: {error}."
    return None if constraint.kind is Kind.CHOICE else _refusal_of_schema(value, constraint.param)


def _refusal_of_text(constraint: Constraint) -> str | None:
    text, param = constraint.text, constraint.param
    if len(text) > TEXT_CHARS:
        return f"`{param}` has {len(text)} characters: {TEXT_CHARS} are the most, so shorten it."
    if constraint.kind is Kind.GRAMMAR and "%json" in text:
        return f"`{param}` embeds a JSON schema, which is not supported: give it as `response_format`."
    if (highest := _highest_count(text)) > REPEATS:
        return f"`{param}` repeats {highest} times: {REPEATS} are the most."
    return None


def _highest_count(text: str) -> int:
    counts = (number for found in _REPEAT.findall(text) for number in _NUMBER.findall(found))
    return max((int(count[:12]) for count in counts), default=0)  # int() refuses very long ones


def _refusal_of_schema(schema: Any, param: str) -> str | None:
    subschemas, items, multiples = 0, 0, 1
    for place in _objects(schema):
        subschemas += 1
        for key, value in place.items():
            if isinstance(value, str):
                if key == "pattern" and (highest := _highest_count(value)) > REPEATS:
                    return f"`{param}` has a pattern that repeats {highest} times: {REPEATS} are the most."
            elif isinstance(value, bool) or not isinstance(value, int | float):
                continue
            elif key in _COUNTED:
                items += int(min(abs(value), ITEMS + 1))
            elif key == "multipleOf":
                multiples = lcm(multiples, _as_integer(value))
        if subschemas > SUBSCHEMAS:
            return f"`{param}` has more than {SUBSCHEMAS} objects: shorten it, or use `$defs` for what is repeated."
        if items > ITEMS:
            return f"`{param}` counts to more than {ITEMS} items in all: lower its minItems and maxItems."
        if multiples > MULTIPLES:
            return f"`{param}` has `multipleOf` with a common multiple above {MULTIPLES}: lower them, or leave one out."
    return None


def _as_integer(value: float) -> int:
    """`value` without its decimal point: 0.25 is 25. At least 1, and no more than is told apart from too much."""
    if isinstance(value, float) and not isfinite(value):
        return MULTIPLES + 1
    _, digits, exponent = Decimal(str(value)).as_tuple()
    number = int("".join(map(str, digits[:18])))
    return max(1, number if len(digits) <= 18 and not (isinstance(exponent, int) and exponent > 0) else MULTIPLES + 1)


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object within `value`. Does not recurse."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(v for v in item.values() if isinstance(v, dict | list))
        elif isinstance(item, list):
            waiting.extend(v for v in item if isinstance(v, dict | list))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _of_format(given: Any) -> Iterator[Constraint]:
    if not isinstance(given, dict):
        return
    if given.get("type") == "json_schema" and isinstance(wrapped := given.get("json_schema"), dict):
        # `json_schema` is the name that vLLM's model has for the alias `schema`; it takes both.
        for name in ("schema", "json_schema"):
            if wrapped.get(name) is not None:
                yield Constraint(Kind.JSON, _as_text(wrapped[name]), "response_format")
    elif given.get("type") == "structural_tag":
        yield Constraint(Kind.STRUCTURAL_TAG, json.dumps(given), "response_format")


def _of_flat_format(given: Any, field: str) -> Iterator[Constraint]:
    """`text` of Responses and `output_config` of Messages: {"format": {"type": "json_schema", "schema": ...}}."""
    wanted = given.get("format") if isinstance(given, dict) else None
    if isinstance(wanted, dict) and wanted.get("type") == "json_schema" and wanted.get("schema") is not None:
        yield Constraint(Kind.JSON, _as_text(wanted["schema"]), f"{field}.format")


def _of_outputs(fields: Mapping[str, Any]) -> Iterator[Constraint]:
    given = fields.get("structured_outputs")
    if not isinstance(given, dict):
        return
    for kind in Kind:
        if given.get(kind.value) is not None:
            yield Constraint(kind, _as_text(given[kind.value]), f"structured_outputs.{kind}")


def _of_tools(fields: Mapping[str, Any]) -> Iterator[Constraint]:
    choice, tools = fields.get("tool_choice"), fields.get("tools")
    kind = choice.get("type") if isinstance(choice, dict) else choice
    if kind in (None, "none", "auto"):
        return
    parameters = [found for tool in _flattened(tools) if (found := _parameters_of(tool)) is not None]
    if parameters:
        yield Constraint(Kind.JSON, json.dumps({"anyOf": parameters}), "tools")


def _flattened(tools: Any) -> Iterator[dict[str, Any]]:
    """Tools, those of a namespace of Responses too, which holds no further ones."""
    for tool in tools if isinstance(tools, list) else ():
        if isinstance(tool, dict):
            yield tool
            inner = tool.get("tools")
            yield from (one for one in (inner if isinstance(inner, list) else ()) if isinstance(one, dict))


def _parameters_of(tool: Mapping[str, Any]) -> Any:
    """The schema of a call: within `function` in chat, beside the name in Responses, `input_schema` in Messages."""
    function = tool.get("function")
    if isinstance(function, dict) and function.get("parameters") is not None:
        return function["parameters"]
    return tool["parameters"] if tool.get("parameters") is not None else tool.get("input_schema")
