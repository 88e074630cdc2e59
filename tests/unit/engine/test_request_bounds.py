"""Token ids that have no row in the embedding: found at the door, in the worker, and in the model itself."""

from pathlib import Path

import mlx.nn as nn
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import TINY, VOCAB_SIZE, build, write_checkpoint

from pomarium.cluster.engine.request_bounds import beyond, refusal, surplus
from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.chat_template import template_of
from pomarium.worker.models.embedding_rows import embedding_rows
from pomarium.worker.models.load import load
from pomarium.worker.requests import RequestTable
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, NewRequest, Step


@given(st.lists(st.integers(-3, 13), max_size=8), st.integers(1, 10))
def test_the_first_id_without_a_row(token_ids: list[int], vocab_size: int) -> None:
    outside = [token for token in token_ids if token not in range(vocab_size)]
    assert beyond(token_ids, vocab_size) == (outside[0] if outside else None)


def test_the_refusal_names_the_token_and_the_last_one_there_is() -> None:
    assert "token id 49152" in refusal(49152, 49152)
    assert "ends at 49151" in refusal(49152, 49152)


def test_the_tokens_that_a_tokenizer_has_too_many() -> None:
    assert surplus({"c": 5, "a": 3, "b": 4}, 4) == ["b", "c"]
    assert surplus({"a": 3}, 4) == []


@pytest.mark.parametrize("token", [VOCAB_SIZE, -1])
def test_the_worker_takes_no_token_in_that_has_no_row(token: int) -> None:
    table = RequestTable(VOCAB_SIZE)
    new = NewRequest("a", (3, token), 2, 0, ((1,),), SamplingParams())
    with pytest.raises(ValueError, match="request a holds tokens"):
        table.apply(Step({"a": 2}, (new,)))
    assert "a" not in table
    table.apply(Step({"a": 1}, (NewRequest("a", (3,), 1, 0, ((1,),), SamplingParams()),)))
    with pytest.raises(ValueError, match="request a holds tokens"):
        table.apply(Step({"a": 2}, cached=(CachedRequest("a", 0, ((1,),), resumed=True, token_ids=(3, token)),)))


@pytest.mark.parametrize("name", sorted(TINY))
def test_the_rows_of_every_family_s_embedding_are_found(name: str) -> None:
    module = build(name)
    kind = type(module)
    assert embedding_rows(module) == VOCAB_SIZE
    assert type(module) is kind
    nn.quantize(module, group_size=32, bits=8, class_predicate=lambda _, layer: isinstance(layer, nn.Embedding))
    assert embedding_rows(module) == VOCAB_SIZE


def test_an_embedding_smaller_than_the_vocabulary_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint("llama", tmp_path / "m")
    assert load(directory, dense=True, dtype=None, vocab_size=VOCAB_SIZE).weight_bytes > 0
    with pytest.raises(CheckpointError, match=r'an embedding of 128 tokens.*write "vocab_size": 128'):
        load(directory, dense=True, dtype=None, vocab_size=VOCAB_SIZE + 1)


def test_chat_templates_of_chat_template_json() -> None:
    assert template_of({"chat_template": "{{ x }}"}) == "{{ x }}"
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert template_of({"chat_template": named}) == {"default": "a", "tool_use": "b"}


@pytest.mark.parametrize(
    "content", [{}, {"chat_template": 3}, {"chat_template": []}, {"chat_template": [{"name": "x"}]}]
)
def test_a_file_without_a_template_is_refused(content: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.json should hold"):
        template_of(content)
