"""What a request may ask of tokenizers and compilers: bounds, whatever JSON comes, and what llguidance then says."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.engine.intake import calls, constraints, grammars, responses, texts
from pomarium.cluster.engine.intake.constraints import Constraint, Kind

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def schema(value: Any) -> Constraint:
    return Constraint(Kind.JSON, json.dumps(value), "response_format")


def nested_objects(levels: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        found = {"type": "object", "properties": {"a": found}, "required": ["a"]}
    return found


def why_not(constraint: Constraint) -> str | None:
    """Both questions, as the guard asks them."""
    return constraints.refusal(constraint) or grammars.fault(constraint)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ({}, []),
        ({"response_format": {"type": "json_object"}}, []),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
            [(Kind.JSON, json.dumps(SCHEMA), "response_format")],
        ),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, [(Kind.JSON, '{"type": "object"}')]),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, [(Kind.REGEX, "a+", "structured_outputs.regex")]),
        ({"structured_outputs": {"choice": ["a", "b"]}}, [(Kind.CHOICE, '["a", "b"]')]),
        ({"tools": [{"function": {"parameters": SCHEMA}}], "tool_choice": "auto"}, []),
        (
            {"tools": [{"function": {"name": "f", "parameters": SCHEMA}}], "tool_choice": "required"},
            [(Kind.JSON, json.dumps({"anyOf": [SCHEMA]}), "tools")],
        ),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
            [(Kind.JSON, json.dumps(SCHEMA), "text.format")],
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
            [(Kind.JSON, json.dumps(SCHEMA), "output_config.format")],
        ),
        (
            {"tools": [{"type": "function", "name": "f", "parameters": SCHEMA}], "tool_choice": {"type": "function"}},
            [(Kind.JSON, json.dumps({"anyOf": [SCHEMA]}), "tools")],
        ),
        (
            {"tools": [{"type": "namespace", "tools": [{"parameters": SCHEMA}]}], "tool_choice": "required"},
            [(Kind.JSON, json.dumps({"anyOf": [SCHEMA]}), "tools")],
        ),
        (
            {"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}},
            [(Kind.JSON, json.dumps({"anyOf": [SCHEMA]}), "tools")],
        ),
        ({"tools": [{"name": "f", "input_schema": SCHEMA}], "tool_choice": {"type": "auto"}}, []),
    ],
)
def test_constraints_are_found_where_clients_put_them(body: dict[str, Any], found: list[tuple[Any, ...]]) -> None:
    seen = constraints.of_body(body)
    assert [(c.kind, c.text, c.param)[: len(f)] for c, f in zip(seen, found, strict=True)] == found


@given(
    st.dictionaries(
        st.sampled_from(
            ["response_format", "structured_outputs", "tools", "tool_choice", "messages", "input", "text", "background"]
        ),
        VALUES
        | st.dictionaries(
            st.sampled_from(["type", "json_schema", "json", "regex", "choice", "grammar", "format", "arguments"]),
            VALUES,
        ),
    )
)
def test_no_body_makes_the_bounds_raise(body: dict[str, Any]) -> None:
    for constraint in constraints.of_body(body):
        assert isinstance(constraints.refusal(constraint), str | None)
    assert isinstance(calls.refusal(body), str | None)
    assert isinstance(responses.refusal(body), str | None)
    assert texts.size_of(body) <= len(json.dumps(body, ensure_ascii=False))


PART = {"type": "output_text", "text": "a"}


@pytest.mark.parametrize(
    ("content", "read"),
    [
        ("text", True),
        ([PART], True),
        (None, True),
        ([], False),
        ([PART, PART], False),
        ([{"type": "refusal", "refusal": "no"}], False),
        (["text"], False),
    ],
)
def test_of_an_earlier_answer_one_text_is_read(content: Any, read: bool) -> None:
    refusal = responses.refusal({"input": ["x", {"role": "assistant", "content": content}]})
    assert (refusal is None) is read
    assert read or "`input[1].content`" in str(refusal)
    assert responses.refusal({"input": [{"role": "user", "content": content}]}) is None


@given(st.sampled_from(list(Kind)), st.text() | VALUES.map(json.dumps))
def test_no_text_makes_the_compiler_raise(kind: Kind, text: str) -> None:
    constraint = Constraint(kind, text, "field")
    if constraints.refusal(constraint) is None:
        assert isinstance(grammars.fault(constraint), str | None)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema(nested_objects(250)), "nested deeper"),
        (schema({"enum": ["v" * 70_000]}), "characters"),
        (schema({"properties": {f"p{i}": {} for i in range(1100)}}), "more than 1000 objects"),
        (schema({"type": "array", "minItems": 10**8}), "items in all"),
        (schema({"type": "array", "maxItems": 10**400}), "items in all"),
        (schema({"type": "array", "items": {"type": "array", "minItems": 6000}, "minItems": 6000}), "items in all"),
        (schema({"type": "integer", "multipleOf": 99991}), "common multiple"),
        (schema({"allOf": [{"multipleOf": 97}, {"multipleOf": 0.101}]}), None),
        (schema({"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}), "common multiple"),
        (schema({"type": "string", "pattern": "a{4000000000}"}), "repeats"),
        (schema({"type": "string", "pattern": "a{0000000000000000000002000000,}"}), "repeats"),
        (Constraint(Kind.JSON, '{"minItems": -1e400}', "f"), "items in all"),
        (Constraint(Kind.JSON, '{"multipleOf": 1e400}', "f"), "common multiple"),
        (schema({"multipleOf": 10**400}), "common multiple"),
        (schema({"multipleOf": 0}), None),
        (Constraint(Kind.JSON, '{"minItems": NaN}', "f"), "not valid JSON"),
        (Constraint(Kind.JSON, "{", "f"), "not valid JSON"),
        (Constraint(Kind.REGEX, "a" * 20_000, "f"), "characters"),
        (Constraint(Kind.REGEX, "[^x]{1,4000000000}", "f"), "repeats"),
        (Constraint(Kind.GRAMMAR, 'start: %json {"type": "array"}', "f"), "embeds a JSON schema"),
        (Constraint(Kind.CHOICE, json.dumps(["x" * 70_000]), "f"), "characters"),
    ],
)
def test_what_is_too_large_is_refused_before_it_is_compiled(constraint: Constraint, words: str | None) -> None:
    refusal = constraints.refusal(constraint)
    assert (words is None) is (refusal is None)
    assert refusal is None or words in refusal  # type: ignore[operator]


@pytest.mark.parametrize(
    "constraint",
    [
        schema(SCHEMA),
        schema(nested_objects(40)),
        schema({"type": "object"}),
        schema({}),
        schema({"type": "array", "items": [{"type": "string"}]}),
        schema({"type": "string", "maxLength": 1000}),
        schema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}}),
        schema({"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}}),
        Constraint(Kind.CHOICE, json.dumps(["a\nb", 'q"\\', "é😀"]), "f"),
        Constraint(Kind.REGEX, "(a+)+b", "f"),
        Constraint(Kind.STRUCTURAL_TAG, '{"structures": [], "triggers": ["<f>"]}', "f"),
        Constraint(Kind.GRAMMAR, 'root ::= "a" | "b" root', "f"),
        Constraint(Kind.GRAMMAR, 'start: "a" | "b"', "f"),
    ],
)
def test_what_can_be_answered_passes(constraint: Constraint) -> None:
    assert why_not(constraint) is None


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (schema({"type": "nonsense"}), "nonsense"),
        (schema({"$ref": "#"}), "admits no text"),
        (schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}), "no text"),
        (schema({"$ref": "#/nowhere"}), "nowhere"),
        (schema({"enum": []}), "Unsatisfiable"),
        (schema(False), "schema"),
        (schema(nested_objects(62)), "recursion limit"),
        (schema({"properties": {f"p{i}": {"type": "string"} for i in range(900)}}), "items"),
        (Constraint(Kind.CHOICE, json.dumps([""]), "f"), "no text"),
        (Constraint(Kind.STRUCTURAL_TAG, '{"type": "structural_tag", "format": {}}', "f"), "backend xgrammar"),
        (Constraint(Kind.CHOICE, "[]", "f"), ""),
        (Constraint(Kind.REGEX, "", "f"), "no text"),
        (Constraint(Kind.REGEX, "[0-9", "f"), "regex"),
        (Constraint(Kind.REGEX, "[^\\s\\S]", "f"), "no text"),
        (Constraint(Kind.REGEX, "((ab){1000}){1000}", "f"), "too many"),
        (Constraint(Kind.GRAMMAR, "  ", "f"), "empty"),
        (Constraint(Kind.GRAMMAR, 'root ::= ""', "f"), "no text"),
        (Constraint(Kind.GRAMMAR, "root ::= root", "f"), "no text"),
        (Constraint(Kind.GRAMMAR, "root ::= foo", "f"), "foo"),
        (Constraint(Kind.GRAMMAR, "root ::= " + "(" * 3000 + '"a"' + ")" * 3000, "f"), "recursion"),
    ],
)
def test_what_cannot_be_answered_says_why_in_one_line(constraint: Constraint, words: str) -> None:
    reason = why_not(constraint)
    assert reason is not None
    assert words in reason
    assert constraint.param in reason
    assert "\n" not in reason
    assert len(reason) < 500


@pytest.mark.parametrize(
    "constraint",
    [
        schema({"anyOf": [{"properties": {f"a{i}": {"minLength": i}}} for i in range(300)]}),
        schema({"allOf": [{"anyOf": [{"properties": {f"a{i}_{j}": {}}} for j in range(4)]} for i in range(12)]}),
        schema({"enum": [f"value {i}" for i in range(4500)]}),
        Constraint(Kind.REGEX, "|".join(f"(a{{1,{i}}}b{{1,{i}}}){{1,{i}}}" for i in range(1, 600)), "f"),
        Constraint(Kind.GRAMMAR, "root ::= " + " ".join(['([a-z]{1,1000} " "){1,1000}'] * 500), "f"),
        Constraint(Kind.GRAMMAR, "root ::= ((([a-z]{1,100}){1,100}){1,100}){1,100}", "f"),
    ],
)
def test_the_worst_that_is_compiled_ends_soon(constraint: Constraint) -> None:
    assert constraints.refusal(constraint) is None
    begun = time.thread_time()
    grammars.fault(constraint)
    assert time.thread_time() - begun < 10.0  # 0.4 s on an idle core


def test_text_is_bounded_by_the_models_length() -> None:
    assert texts.limit_of(2048) == 1_000_000
    assert texts.limit_of(131_072) == 2_097_152
    body = {"messages": [{"role": "user", "content": "x" * 90}], "prompt": [1, 2, 3]}
    assert texts.size_of(body) == len("messagesrolecontentpromptuser") + 90 + 1 + 3
    assert texts.refusal(body, 200, 10_000) is None
    assert texts.refusal(body, 100, 10_000) is not None
    assert texts.refusal(body, 100, 100) is None, "a body has no less than its fields"


def test_arguments_of_calls_are_json_within_json() -> None:
    def body(arguments: Any) -> dict[str, Any]:
        return {"messages": [{}, {"tool_calls": [{"function": {"arguments": arguments}}]}]}

    assert calls.refusal(body('{"a": [1, 2]}')) is None
    assert calls.refusal(body({"a": 1})) is None
    assert calls.refusal(body("[" * 20_000 + "]" * 20_000)) == (
        "`messages[1].tool_calls[0].function.arguments` is nested deeper than 128 levels: send it flatter."
    )
