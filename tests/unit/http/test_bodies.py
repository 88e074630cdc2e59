"""Bodies: what JSON's reader takes and nothing behind it does is told in one sentence, whatever its size."""

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.http.bodies import DEPTH, BodyError, check_depth, check_values, parsed

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
)


def nested(levels: int, inner: Any = 0) -> Any:
    """`levels` arrays within each other."""
    for _ in range(levels):
        inner = [inner]
    return inner


@given(st.dictionaries(TEXT, VALUES), st.booleans())
def test_json_comes_out_as_it_went_in(value: dict[str, Any], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parsed(text.encode()) == value
    assert parsed(text) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings_of_json(encoding: str) -> None:
    assert parsed('{"prompt": "é😀"}'.encode(encoding)) == {"prompt": "é😀"}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not valid JSON"),
        (b"{nope", "not valid JSON"),
        (b"[1]", "must be an object"),
        (b"\xff\xfe", "not valid JSON"),
        (b'{"a": "\xed\xa0\xbd"}', "not UTF-8 at byte 7"),
        (b'{"temperature": NaN}', "NaN is no JSON number"),
        (b'{"temperature": -Infinity}', "-Infinity is no JSON number"),
        (b'{"top_k": 18446744073709551616}', "an integer of more than 64 bits in `top_k`"),
        (b'{"a": [{"b": -9223372036854775809}]}', r"more than 64 bits in `a\[0\]\.b`"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_what_is_no_json_object(body: bytes, words: str) -> None:
    with pytest.raises(BodyError, match=words):
        parsed(body)


@pytest.mark.parametrize("levels", [DEPTH, 1_000, 20_000, 1_000_000])
@pytest.mark.parametrize("bracket", ["[", '{"a":'])
def test_deep_nesting_is_refused_at_any_depth(levels: int, bracket: str) -> None:
    closing = "]" if bracket == "[" else "}"
    body = '{"metadata": ' + bracket * levels + "1" + closing * levels + "}"
    with pytest.raises(BodyError, match="deeper than 128 levels"):
        parsed(body.encode())
    with pytest.raises(BodyError):
        parsed(('{"metadata": ' + bracket * levels).encode())  # never closed


def test_the_place_of_the_nesting_is_named() -> None:
    with pytest.raises(BodyError, match=r"in `tools\[1\]\.parameters\[0\]"):
        parsed(json.dumps({"tools": [{}, {"parameters": nested(DEPTH)}]}).encode())


def test_a_body_of_nothing_but_brackets_is_looked_at_in_little_memory() -> None:
    """As many values as fit below the bound on bodies, each as deep as may be."""
    body = b'{"x":' + b"[" * 121 + b"],[".join([b""] * 1_900_000) + b"]" * 121 + b"}"
    assert 5 << 20 < len(body) < 8 << 20
    value = json.loads(body)
    tracemalloc.start()
    try:
        check_depth(value)
        check_values(value)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


@given(st.integers(1, DEPTH - 1))
def test_what_is_less_deep_passes_beside_many_brackets(levels: int) -> None:
    value = {"a": nested(levels), "b": [[0]] * DEPTH, "c": "[" * DEPTH}
    assert parsed(json.dumps(value).encode()) == value


@given(st.integers(1, 300), st.integers(1, 300))
def test_depth_is_what_is_bounded(levels: int, limit: int) -> None:
    if levels <= limit:
        check_depth(nested(levels), limit)
    else:
        with pytest.raises(BodyError):
            check_depth(nested(levels), limit)


@pytest.mark.parametrize("half", ["\\ud83d", "\\uD83D", "\\udC00", "\\ud83d\\ud83d", "\\ud83dx\\ude00"])
@pytest.mark.parametrize(
    ("body", "place"),
    [
        ('{"model": "a%s"}', "`model`"),
        ('{"stop": ["b", "%s"]}', r"`stop\[1\]`"),
        ('{"messages": [{"content": "%s"}]}', r"`messages\[0\]\.content`"),
        ('{"metadata": {"%s": 1}}', "a key of `metadata`"),
        ('{"%s": 1}', "a key of itself"),
    ],
)
def test_half_a_surrogate_pair_is_refused_where_it_stands(half: str, body: str, place: str) -> None:
    with pytest.raises(BodyError, match=f"half of a surrogate pair in {place}") as caught:
        parsed((body % half).encode())
    assert str(caught.value).isascii()


@pytest.mark.parametrize("text", ["\\ud83d\\ude00", "\\\\ud83d", "ud83d"])
def test_whole_pairs_and_escaped_escapes_pass(text: str) -> None:
    assert parsed(f'{{"stop": "{text}"}}'.encode())["stop"] == json.loads(f'"{text}"')


def test_a_place_is_shown_in_few_words() -> None:
    key = "k" * 100_000
    with pytest.raises(BodyError) as caught:
        parsed(f'{{"{key}": {{"{key}": ["\\ud83d"]}}}}'.encode())
    assert len(str(caught.value)) < 300
