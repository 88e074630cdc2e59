"""Multimodal releases loaded as text models: rows over the paged pool against mlx-lm's own forward, FP8 among them.

Gemma 4 has what no other family has: windows of some layers only, heads of two sizes, per-layer embeddings, and layers
that attend over another layer's K and V.
"""

import json
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from equality import BOUND, check_tokens, logit_error, reference
from hybrid_models import ONE_SLOT, HybridDriver, hybrid_backend, poisoned_states
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model
from step_driver import Driver
from tiny_models import VOCAB_SIZE, WINDOW
from wrapper_models import GEMMA4, WRAPPED, build_text, release, write_wrapper

from pomarium.cluster.executor.codec import describe, rebuild
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch
from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import single_group_states
from pomarium.worker.models.load import load
from pomarium.worker.models.paged import PagedModel, StageModel, prepare, prepare_stage
from pomarium.worker.models.stages import StageCut

NEW_TOKENS = 8
BLOCK_SIZE, NUM_BLOCKS = 8, 256
PROMPT_LENGTHS = {"one": 1, "window": WINDOW, "block": 16, "long": 43}
CHUNKS = (7, 1, 16, 50)
BLOCKS = ((16, 16), (20, 24), (128, 128))
"""Of FP8 scales: dividing the matrices, leaving a rest, and larger than them."""

CASES = [(name, None) for name in WRAPPED] + [
    *[("qwen3_5", blocks) for blocks in BLOCKS],
    ("qwen3_5_moe", (16, 16)),
    ("gemma4_dense", (16, 16)),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


def theirs(name: str, blocks: tuple[int, int] | None, folder: Path) -> nn.Module:
    """What mlx-lm itself makes of the text model, its weights rounded as FP8 rounds them."""
    if blocks is None:
        return build_text(name)
    dense = release(name, blocks, folder) / "dense"
    return load_model(dense, model_config={"vocab_size": VOCAB_SIZE})[0]


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(3, 120, length).tolist() for name, length in PROMPT_LENGTHS.items()}


def driver_of(model: PagedModel) -> Driver:
    return HybridDriver(model, BLOCK_SIZE) if model.states else Driver(model, BLOCK_SIZE, NUM_BLOCKS)


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_a_release_computes_what_mlx_lm_does(name: str, blocks: tuple[int, int] | None, folder: Path) -> None:
    """Chunked prompts of four lengths in one batch, one of them preempted, then decode: every logit, and the tokens."""
    loaded = load(release(name, blocks, folder), dense=True, dtype=mx.float32)
    driver = driver_of(prepare(loaded.model, loaded.config["model_type"]))
    tokens = driver.run(prompts(), NEW_TOKENS, chunks=CHUNKS, preempt=lambda step: ["block"] if step == 4 else [])
    module = theirs(name, blocks, folder)
    for request, prompt in prompts().items():
        want = reference(module, prompt, NEW_TOKENS)
        compared = len(prompt) if check_tokens(tokens[request], want) else len(want.logits)
        got = np.stack([driver.recorder.logits[request][position] for position in range(compared)])
        assert logit_error(got, want.logits[:compared]) < BOUND


@cache
def paged(name: str) -> PagedModel:
    return prepare(build_text(name), "gemma4_text")


@cache
def alone(name: str, length: int, seed: int) -> tuple[list[int], list[np.ndarray]]:
    """Tokens and logits of one request by itself, its prompt in one chunk."""
    driver = driver_of(paged(name))
    prompt = np.random.default_rng(seed).integers(3, 120, length).tolist()
    tokens = driver.run({"a": prompt}, NEW_TOKENS)["a"]
    return tokens, [driver.recorder.logits["a"][position] for position in range(length + NEW_TOKENS - 1)]


@pytest.mark.parametrize("name", GEMMA4)
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    preempted=st.sets(st.tuples(st.integers(1, 12), st.integers(0, 4)), max_size=4),
)
def test_batch_chunks_and_preemption_change_nothing(
    name: str, lengths: list[int], chunks: list[int], preempted: set[tuple[int, int]]
) -> None:
    driver = driver_of(paged(name))
    tokens = driver.run(
        {str(i): np.random.default_rng(i).integers(3, 120, length).tolist() for i, length in enumerate(lengths)},
        NEW_TOKENS,
        chunks=chunks,
        preempt=lambda step: [str(request) for at, request in preempted if at == step],
    )
    for index, length in enumerate(lengths):
        want, rows = alone(name, length, index)
        got = np.stack([driver.recorder.logits[str(index)][position] for position in range(len(rows))])
        assert logit_error(got, np.stack(rows)) < BOUND
        assert tokens[str(index)] == want


@pytest.mark.parametrize("name", GEMMA4)
def test_mlx_lm_is_left_untouched(name: str) -> None:
    """A model that was made ready still runs mlx-lm's way, over its own caches or none, as one that was not."""
    tokens = mx.array([prompts()["long"]])
    assert mx.array_equal(paged(name).module(tokens), build_text(name)(tokens))
    prompt = prompts()["block"]
    assert reference(paged(name).module, prompt, 3).tokens == reference(build_text(name), prompt, 3).tokens
    contiguous = Driver(paged(name), paged=False).run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    for request, text in prompts().items():
        check_tokens(contiguous[request], reference(build_text(name), text, NEW_TOKENS))


def test_layers_that_share_keep_and_write_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of eight layers own their K and V; each writes once in a step, and all eight attend."""
    model = paged("gemma4_small")
    assert len(model.layers) == 4
    assert [(layer.window, layer.head_dim) for layer in model.layers] == [(4, 8), (4, 8), (None, 16), (4, 8)]
    written: list[int] = []
    write = PagedPool.write

    def counted(pool: PagedPool, layer: int, *arrays: Any) -> None:
        written.append(layer)
        write(pool, layer, *arrays)

    monkeypatch.setattr(PagedPool, "write", counted)
    Driver(model).run({"a": prompts()["block"]}, 2)
    assert written == [0, 1, 2, 3] * 2


class Staged:
    """A Forward over stages, each with pools of its own layers and the whole model's tables."""

    def __init__(self, stages: Sequence[StageModel], whole: CacheLayout) -> None:
        self._stages = [(stage, self._backend(stage, whole)) for stage in stages]

    def _backend(self, stage: StageModel, whole: CacheLayout) -> AttentionBackend:
        groups = tuple(
            CacheGroup(own, BLOCK_SIZE, group.window, group.table)
            for group in whole.groups
            if (own := tuple(index for index, layer in enumerate(stage.layers) if layer.window == group.window))
        )
        if stage.states:
            states = single_group_states(stage.states, ONE_SLOT, whole.num_blocks, 1)
            return hybrid_backend(stage, whole.num_blocks, BLOCK_SIZE, poisoned_states(states))
        layout = CacheLayout(stage.layers, groups, tuple(range(len(stage.layers))), whole.num_blocks)
        return GatheredAttention(PagedPool(layout, stage.dtype))

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        passed = token_ids
        for stage, backend in self._stages:
            passed = stage(passed, batch.positions, backend.prepare(batch), batch.logit_rows)
            mx.eval(passed, backend.arrays)
        return passed

    def release(self, request_ids: object) -> None:
        """The driver owns the blocks."""


def load_stage(directory: Path, cut: StageCut) -> StageModel:
    loaded = load(directory, dense=True, dtype=mx.float32, cut=cut)
    return prepare_stage(loaded.model, loaded.config["model_type"], cut)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [("gemma4_dense", None), ("gemma4_moe", None), ("qwen3_5", (16, 16)), ("qwen3_5_moe", (16, 16))],
)
@pytest.mark.parametrize("bounds", [(0, 3, 6), (0, 1, 4, 6)], ids=str)
def test_stages_give_what_the_whole_gives(
    name: str, blocks: tuple[int, int] | None, bounds: tuple[int, ...], folder: Path
) -> None:
    """To the bit."""
    directory = release(name, blocks, folder)
    loaded = load(directory, dense=True, dtype=mx.float32)
    whole = driver_of(prepare(loaded.model, loaded.config["model_type"]))
    want = whole.run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    stages = [load_stage(directory, StageCut(first, end, 6)) for first, end in pairwise(bounds)]
    staged = driver_of(prepare(build_text(name), loaded.config["model_type"]))
    staged.recorder.inner = Staged(stages, staged.layout)
    assert staged.run(prompts(), NEW_TOKENS, chunks=CHUNKS) == want
    for request, rows in whole.recorder.logits.items():
        for position, row in rows.items():
            np.testing.assert_array_equal(staged.recorder.logits[request][position], row)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "layer 0 is given more of the tokens than the hidden state"),
        ({"hidden_size_per_layer_input": 0}, "layer 4 is given what an earlier one hands on beside the hidden state"),
    ],
)
def test_gemma_4_with_shared_keys_is_not_cut(changes: dict[str, Any], reason: str) -> None:
    module = build_text("gemma4_small", **changes)
    with pytest.raises(
        UnsupportedError, match=rf"'gemma4' cannot be cut into stages: {reason}; serve it with one"
    ) as e:
        prepare_stage(module, "gemma4", StageCut(0, 4, 8))
    again = rebuild(describe(1, "load_model", e.value), "worker 0")  # as the engine gets it from the stage's Mac
    assert (type(again), str(again)) == (type(e.value), str(e.value))


def test_damaged_scales_are_found_by_the_stage_that_reads_them(folder: Path, tmp_path: Path) -> None:
    """And by no other: a stage reads its own layers only."""
    damaged = "model.language_model.layers.4.mlp.down_proj.weight_scale_inv"
    write_wrapper("qwen3_5", tmp_path, (16, 16), damage={damaged: lambda scales: scales * np.nan})
    load(tmp_path, dense=True, dtype=mx.float32, cut=StageCut(0, 4, 6))
    for cut in (StageCut(4, 6, 6), None):
        with pytest.raises(CheckpointError, match=r"layers\.4\.mlp\.down_proj\.weight .*FP8 scales are damaged"):
            load(tmp_path, dense=True, dtype=mx.float32, cut=cut)


def test_configs_as_transformers_saves_them_are_read(tmp_path: Path) -> None:
    """Sizes of heads per layer, no vocabulary outside of text_config, kinds of layers as a list."""
    from transformers import AutoConfig

    for name in ("gemma4_small", "gemma4_dense", "gemma4_moe", "qwen3_5"):
        directory = write_wrapper(name, tmp_path / name)
        AutoConfig.from_pretrained(directory).save_pretrained(directory)
        saved = json.loads((directory / "config.json").read_text())
        assert not {"global_head_dim", "full_attention_interval"} & saved["text_config"].keys()
        tokens = mx.array([prompts()["long"]])
        ours = load(directory, dense=True, dtype=mx.float32).model(tokens)
        assert logit_error(np.array(ours), np.array(build_text(name)(tokens))) < BOUND
