"""The check on a model's own weights passes a right model and refuses one that is wrong on the paged cache only."""

import dataclasses

import pytest
from tiny_models import TINY, build
from wrapper_models import GEMMA4

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.paged import PagedModel, StageModel, prepare, prepare_stage
from pomarium.worker.models.stages import StageCut
from pomarium.worker.models.verify import PROVEN, verify, verify_stage


def paged(name: str) -> PagedModel:
    return prepare(build(name), TINY[name]["model_type"])


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_right_models_pass(name: str) -> None:
    verify(paged(name), name)


def test_a_window_that_is_not_the_model_s_is_refused() -> None:
    right = paged("llama")
    wrong = dataclasses.replace(right, layers=tuple(dataclasses.replace(layer, window=3) for layer in right.layers))
    with pytest.raises(UnsupportedError, match=r"'llama' gives other results.*VLLM_METAL_USE_PAGED_ATTENTION=0"):
        verify(wrong, "llama")


def stage(name: str, first: int, end: int) -> StageModel:
    module = build(name)
    return prepare_stage(module, TINY[name]["model_type"], StageCut(first, end, len(module.layers)))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo3"])
@pytest.mark.parametrize("part", ["first", "middle", "last"])
def test_right_stages_pass(name: str, part: str) -> None:
    layers = TINY[name]["num_hidden_layers"]
    first, end = {"first": (0, 1), "middle": (1, layers - 1), "last": (layers - 1, layers)}[part]
    if first < end:
        verify_stage(stage(name, first, end), name)


@pytest.mark.parametrize("last", [False, True])
def test_a_stage_with_another_window_is_refused(last: bool) -> None:
    layers = TINY["llama"]["num_hidden_layers"]
    right = stage("llama", 1 if last else 0, layers if last else 1)
    wrong = dataclasses.replace(
        right,
        layers=tuple(dataclasses.replace(layer, window=3) for layer in right.layers),
        entries=tuple((own, 3) for own, _ in right.entries),
    )
    with pytest.raises(UnsupportedError, match="'llama' gives other results"):
        verify_stage(wrong, "llama")


def test_the_proven_types_are_those_of_the_parity_tests() -> None:
    of_wrappers = {"gemma4", *(config["model_type"] for config in GEMMA4.values())}
    assert {config["model_type"] for config in TINY.values()} | of_wrappers == PROVEN
