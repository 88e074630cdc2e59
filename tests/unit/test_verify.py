"""The check on a model's own weights passes a right model and refuses one that is wrong on the paged cache only."""

import dataclasses

import pytest
from tiny_models import TINY, build

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.models.verify import PROVEN, verify


def paged(name: str) -> PagedModel:
    return prepare(build(name), TINY[name]["model_type"])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_right_models_pass(name: str) -> None:
    verify(paged(name), name)


def test_a_window_that_is_not_the_model_s_is_refused() -> None:
    right = paged("llama")
    wrong = dataclasses.replace(right, layers=tuple(dataclasses.replace(layer, window=3) for layer in right.layers))
    with pytest.raises(UnsupportedError, match=r"'llama' gives other logits.*VLLM_METAL_USE_PAGED_ATTENTION=0"):
        verify(wrong, "llama")


def test_the_proven_types_are_those_of_the_parity_tests() -> None:
    assert {config["model_type"] for config in TINY.values()} == PROVEN
