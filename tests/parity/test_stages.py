"""Stages give what the whole model gives, to the bit: every family and kind of checkpoint, down to one layer each."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten, tree_unflatten
from step_driver import Driver
from tiny_gguf import write_gguf
from tiny_models import TINY, build, write_checkpoint

from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch
from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.gguf.convert import convert
from pomarium.worker.models.load import load
from pomarium.worker.models.paged import PagedModel, StageModel, prepare, prepare_stage
from pomarium.worker.models.stage_weights import blank, foreign_parameters
from pomarium.worker.models.stages import StageCut

PROMPT_LENGTHS = {"one": 1, "block": 8, "long": 21}
CHUNKS = (9, 1, 13)
NEW_TOKENS = 2
BLOCK_SIZE, NUM_BLOCKS = 8, 32

Logits = dict[str, dict[int, np.ndarray]]


class StagedForward:
    """A Forward (worker/forward.py) over stages, each with a pool of its own layers and the whole model's tables."""

    def __init__(self, stages: Sequence[StageModel], whole: CacheLayout) -> None:
        self._stages = [(stage, GatheredAttention(PagedPool(_layout(stage, whole), stage.dtype))) for stage in stages]

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        passed = token_ids
        for stage, backend in self._stages:
            passed = stage(passed, batch.positions, backend.prepare(batch), batch.logit_rows)
            mx.eval(passed, backend.arrays)
            if not stage.cut.has_head:
                assert passed.shape == (len(batch.token_ids), stage.hidden_size)
        return passed

    def release(self, request_ids: Sequence[str]) -> None:
        """The driver owns the blocks."""


def _layout(stage: StageModel, whole: CacheLayout) -> CacheLayout:
    own = {
        group: tuple(index for index, layer in enumerate(stage.layers) if layer.window == group.window)
        for group in whole.groups
    }
    groups = tuple(CacheGroup(layers, BLOCK_SIZE, g.window, g.table) for g, layers in own.items() if layers)
    return CacheLayout(stage.layers, groups, tuple(range(len(stage.layers))), NUM_BLOCKS)


def cuts(num_layers: int, bounds: Sequence[int]) -> list[StageCut]:
    return [StageCut(first, end, num_layers) for first, end in pairwise(bounds)]


def two_three_and_one_each(num_layers: int) -> list[list[int]]:
    """Bounds of two stages, of three unequal ones, and of one layer per stage; each cut once."""
    wanted = [[0, num_layers // 2, num_layers], [0, 1, num_layers - 1, num_layers], list(range(num_layers + 1))]
    return [list(b) for b in dict.fromkeys(map(tuple, wanted)) if len(set(b)) == len(b)]


def stage_of(module: nn.Module, model_type: str, cut: StageCut) -> StageModel:
    """A stage with nothing but its own parameters, as `load` leaves it."""
    foreign = foreign_parameters(module, cut, model_type)
    parameters = tree_flatten(module.parameters())
    module.update(tree_unflatten([(path, blank(value)) for path, value in parameters if path in foreign]))
    return prepare_stage(module, model_type, cut)


def generate(driver: Driver) -> tuple[dict[str, list[int]], Logits]:
    rng = np.random.default_rng(0)
    prompts = {name: rng.integers(3, 120, length).tolist() for name, length in PROMPT_LENGTHS.items()}
    tokens = driver.run(prompts, NEW_TOKENS, chunks=CHUNKS)
    return tokens, driver.recorder.logits


@dataclass(frozen=True)
class Whole:
    """What the whole model gives on one machine."""

    model: PagedModel
    tokens: dict[str, list[int]]
    logits: Logits


def whole_of(module: nn.Module, model_type: str) -> Whole:
    model = prepare(module, model_type)
    return Whole(model, *generate(Driver(model, BLOCK_SIZE, NUM_BLOCKS)))


@cache
def tiny(name: str) -> nn.Module:
    return build(name)


@cache
def tiny_whole(name: str) -> Whole:
    return whole_of(deepcopy(tiny(name)), TINY[name]["model_type"])


@cache
def tiny_stage(name: str, cut: StageCut) -> StageModel:
    return stage_of(deepcopy(tiny(name)), TINY[name]["model_type"], cut)


def tiny_stages(name: str, bounds: Sequence[int]) -> list[StageModel]:
    return [tiny_stage(name, cut) for cut in cuts(TINY[name]["num_hidden_layers"], bounds)]


def check_equal(stages: Sequence[StageModel], whole: Whole) -> None:
    """Chunked prompts and decode steps mixed in one batch: tokens, and logits at every position."""
    driver = Driver(whole.model, BLOCK_SIZE, NUM_BLOCKS)
    driver.recorder.inner = StagedForward(stages, driver.layout)
    got_tokens, got = generate(driver)
    assert got_tokens == whole.tokens
    assert got.keys() == whole.logits.keys()
    for request, rows in whole.logits.items():
        assert len(rows) == PROMPT_LENGTHS[request] + NEW_TOKENS - 1
        assert got[request].keys() == rows.keys()
        for position, row in rows.items():
            assert np.isfinite(row).all()
            assert np.array_equal(got[request][position], row), (request, position)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_cut_of_every_family_is_bit_equal(name: str) -> None:
    num_layers = TINY[name]["num_hidden_layers"]
    for bounds in two_three_and_one_each(num_layers):
        stages = tiny_stages(name, bounds)
        assert sum(len(stage.layers) for stage in stages) == num_layers
        check_equal(stages, tiny_whole(name))


@pytest.mark.parametrize("bounds", [[0, 2, 6], [0, 3, 5, 6], [0, 2, 3, 6]])
@pytest.mark.parametrize("name", ["gemma3_text", "llama_sliding"])
def test_stages_without_a_global_layer(name: str, bounds: list[int]) -> None:
    """Layers 2 and 5 are global: in each cut one stage has none, or nothing else."""
    stages = tiny_stages(name, bounds)
    assert any(len({layer.window for layer in stage.layers}) == 1 for stage in stages)
    check_equal(stages, tiny_whole(name))


def test_a_stage_leaves_mlx_lm_s_module_untouched_even_by_an_exception() -> None:
    module = build("gemma3_text")
    classes = [type(part) for part in module.modules()]
    stage = prepare_stage(module, "gemma3_text", StageCut(2, 4, 6))
    inner = type(module.model)  # HeadRows keeps its subclass, as on one machine

    class BrokenError(Exception):
        """Not one that the stage knows."""

    class BrokenStep:
        def attend(self, *_: object) -> mx.array:
            raise BrokenError

    hidden = mx.zeros((3, stage.hidden_size))
    with pytest.raises(BrokenError):
        stage(hidden, np.arange(3, dtype=np.int32), BrokenStep(), np.zeros(1, np.int32))
    for part, kind in zip(module.modules(), classes, strict=True):
        assert type(part) is (inner if part is module.model else kind)
    assert mx.array_equal(module(mx.array([[5, 9, 44, 3, 77]])), build("gemma3_text")(mx.array([[5, 9, 44, 3, 77]])))


def quantised_checkpoint(name: str, directory: Path, mode: str) -> Path:
    """A checkpoint as mlx-lm's converter writes one, wide enough for groups of 32."""
    module = build(name)
    write_checkpoint(name, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4, "mode": mode}
    (directory / "config.json").write_text(json.dumps(config))

    def divides(_: str, part: nn.Module) -> bool:
        return isinstance(part, nn.Linear | nn.Embedding) and part.weight.shape[-1] % 32 == 0

    nn.quantize(module, group_size=32, bits=4, mode=mode, class_predicate=divides)
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    return directory


def check_loaded(directory: Path, dense: bool) -> None:
    """Loaded stages compute what the loaded model computes, and hold its bytes between them."""
    whole = load(directory, dense=dense, dtype=mx.float32)
    model_type, num_layers = whole.config["model_type"], whole.config["num_hidden_layers"]
    each = cuts(num_layers, range(num_layers + 1))
    loaded = [load(directory, dense=dense, dtype=mx.float32, cut=cut) for cut in each]
    stages = [prepare_stage(part.model, model_type, cut) for part, cut in zip(loaded, each, strict=True)]
    embedding = sum(value.nbytes for path, value in tree_flatten(whole.model.parameters()) if "embed" in path)
    twice = 0 if "lm_head" in whole.model else embedding
    assert sum(part.weight_bytes for part in loaded) == whole.weight_bytes + twice
    check_equal(stages, whole_of(whole.model, model_type))


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("name", "mode"), [("llama", "affine"), ("qwen3_moe", "mxfp4")])
def test_stages_of_quantised_checkpoints(name: str, mode: str, dense: bool, tmp_path: Path) -> None:
    check_loaded(quantised_checkpoint(name, tmp_path, mode), dense)


@pytest.mark.parametrize("dense", [True, False])
def test_stages_of_a_converted_gguf(dense: bool, tmp_path: Path) -> None:
    write_gguf("llama", tmp_path / "m.gguf", Kind.Q4_0)
    directory = tmp_path / "converted"
    directory.mkdir()
    convert(tmp_path / "m.gguf", directory)
    check_loaded(directory, dense)


def test_a_cut_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint("llama", tmp_path)
    with pytest.raises(CheckpointError, match="has 4 layers, but 6 were cut"):
        load(directory, dense=True, dtype=mx.float32, cut=StageCut(0, 3, 6))
    with pytest.raises(ValueError, match="does not fit a model of 4"):
        prepare_stage(build("llama"), "llama", StageCut(0, 3, 6))


@pytest.mark.parametrize(("first", "end"), [(-1, 2), (2, 2), (3, 2), (0, 5)])
def test_a_cut_outside_of_the_layers_is_refused(first: int, end: int) -> None:
    with pytest.raises(ValueError, match="no stage of 4 layers"):
        StageCut(first, end, 4)


class Odd(nn.Module):
    """Two layers, called in a way that no cut can follow."""

    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.oddity = oddity
        self.embed = nn.Embedding(8, 8)
        self.extra = nn.Embedding(8, 8)
        self.layers = [OddLayer(oddity), OddLayer(oddity)]

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        hidden, handed = self.embed(tokens), None
        for _ in range(2 if self.oddity == "loop" else 1):
            for layer in [] if self.oddity == "none" else self.layers:
                hidden = layer(hidden, self.extra(tokens) if self.oddity == "tokens" else handed)
                if self.oddity == "between":
                    hidden *= 2.0
                if self.oddity in ("tuple", "beside"):
                    hidden, beside = hidden
                    handed = beside if self.oddity == "tuple" else None
        return hidden


class OddLayer(nn.Module):
    def __init__(self, oddity: str) -> None:
        super().__init__()
        self.oddity = oddity
        self.proj = nn.Linear(8, 8)

    def __call__(self, hidden: mx.array, extra: mx.array | None) -> object:
        out = self.proj(hidden if extra is None else hidden + extra)
        return (out, out) if self.oddity in ("tuple", "beside") else out


@pytest.mark.parametrize(
    ("oddity", "reason"),
    [
        ("loop", "layer 0 runs where layer 2 was expected"),
        ("none", "runs 0 of its 2 layers"),
        ("between", "changes the hidden state between layers 0 and 1"),
        ("tokens", "layer 0 is given more of the tokens"),
        ("tuple", "layer 1 is given what an earlier one hands on beside the hidden state"),
    ],
)
@pytest.mark.parametrize("cut", [StageCut(0, 1, 2), StageCut(1, 2, 2)])
def test_what_a_cut_would_compute_wrongly_is_refused_by_name(oddity: str, reason: str, cut: StageCut) -> None:
    with pytest.raises(UnsupportedError, match=rf"'odd' cannot be cut into stages: .*{reason}.*one stage"):
        foreign_parameters(Odd(oddity), cut, "odd")


@pytest.mark.parametrize("harmless", ["no", "beside"])
def test_a_model_like_it_without_an_oddity_is_cut(harmless: str) -> None:
    assert foreign_parameters(Odd(harmless), StageCut(0, 1, 2), "odd") == {
        "extra.weight", "layers.1.proj.weight", "layers.1.proj.bias",
    }  # fmt: skip
