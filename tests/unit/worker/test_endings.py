"""Where answers end: every source counts, and what config.json alone names of ordinary text does not."""

from typing import Any

import pytest

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.endings import TokenizerFacts, endings_of

MARKS = frozenset({0, 1, 2, 106})
NONE: dict[str, Any] = {}


def ids(
    generation: dict[str, Any], config: dict[str, Any], tokenizer: TokenizerFacts | None, vocab_size: int = 200
) -> list[int]:
    return endings_of(generation, config, tokenizer, vocab_size).token_ids


@pytest.mark.parametrize(
    ("generation", "config", "end", "expected"),
    [
        ({"temperature": 0.6}, {"eos_token_id": [0, 2]}, 0, [0, 2]),
        (NONE, {"eos_token_id": [0, 2]}, 0, [0, 2]),
        ({"eos_token_id": [1, 106]}, {"eos_token_id": 1}, 1, [1, 106]),
        ({"eos_token_id": 2}, NONE, 0, [0, 2]),
        (NONE, {"text_config": {"eos_token_id": 106}}, 1, [1, 106]),
        (NONE, {"eos_token_id": 1, "text_config": {"eos_token_id": [1, 106]}}, None, [1, 106]),
        (NONE, {"eos_token_id": None, "text_config": None}, 2, [2]),
        (NONE, NONE, None, []),
    ],
)
def test_every_source_counts(
    generation: dict[str, Any], config: dict[str, Any], end: int | None, expected: list[int]
) -> None:
    assert ids(generation, config, TokenizerFacts(end, MARKS)) == expected


def test_a_class_s_default_that_is_text_here_does_not_end_answers() -> None:
    assert ids(NONE, {"eos_token_id": 5}, TokenizerFacts(0, MARKS)) == [0]
    assert ids({"eos_token_id": [5]}, {"eos_token_id": 5}, TokenizerFacts(0, MARKS)) == [0, 5]
    assert ids(NONE, {"eos_token_id": 5}, TokenizerFacts(None, MARKS)) == [5]
    assert ids(NONE, {"eos_token_id": 5}, None) == [5]


def test_ids_beyond_the_vocabulary_are_left_out() -> None:
    assert ids({"eos_token_id": [2, 200, -1]}, NONE, TokenizerFacts(400, MARKS)) == [2]


@pytest.mark.parametrize("value", ["</s>", True, 2.0, [2, "x"], [[2]], {"id": 2}])
def test_what_is_no_id_is_an_error(value: object) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: its eos_token_id is "):
        ids(NONE, {"eos_token_id": value}, None)


def test_the_log_says_which_source_names_which_token() -> None:
    found = endings_of({"eos_token_id": 2}, {"eos_token_id": [0, 2]}, TokenizerFacts(0, MARKS), 200)
    line = found.described(lambda token: f"<{token}>")
    assert line == "answers end at <2> (2: generation_config.json, config.json); <0> (0: tokenizer, config.json)"
    assert "no end token" in endings_of(NONE, NONE, None, 200).described(str)
