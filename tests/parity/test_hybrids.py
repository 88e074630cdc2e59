"""Hybrid models, tiny and random: rows over the paged pool and the pool of states against mlx-lm's own forward."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from equality import BOUND, check_tokens, logit_error, reference
from hybrid_models import (
    HYBRIDS,
    ONE_SLOT,
    HybridDriver,
    build_hybrid,
    hybrid_backend,
    paged_hybrid,
    poisoned_states,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from step_driver import GREEDY, Driver

from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.states import single_group_states
from pomarium.worker.models.paged import StageModel, prepare_stage
from pomarium.worker.models.stage_weights import blank, foreign_parameters
from pomarium.worker.models.stages import StageCut
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import NewRequest, Step

NEW_TOKENS = 6
BLOCK_SIZE = 8
PROMPT_LENGTHS = {"one": 1, "short": 5, "block": 16, "long": 43}
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=11)


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 120, length).tolist()


def prompts() -> dict[str, list[int]]:
    return {name: prompt(length, index) for index, (name, length) in enumerate(PROMPT_LENGTHS.items())}


@pytest.mark.parametrize("name", sorted(HYBRIDS))
@pytest.mark.parametrize("tokens_per_slot", [ONE_SLOT, BLOCK_SIZE])
def test_hybrid_matches_mlx_lm(name: str, tokens_per_slot: int) -> None:
    """Chunked prompts of four lengths in one batch, then decode: logits at every position, and the tokens."""
    driver = HybridDriver(paged_hybrid(name), BLOCK_SIZE, tokens_per_slot=tokens_per_slot)
    tokens = driver.run(prompts(), NEW_TOKENS, chunks=(7, 1, 16, 50))
    for request, text in prompts().items():
        want = reference(paged_hybrid(name).module, text, NEW_TOKENS)
        compared = len(text) if check_tokens(tokens[request], want) else len(want.logits)
        got = np.stack([driver.recorder.logits[request][position] for position in range(compared)])
        assert logit_error(got, want.logits[:compared]) < BOUND


def test_mlx_lm_is_left_untouched() -> None:
    """A model that was made ready still runs mlx-lm's way, over its own cache or none, as one that was not."""
    tokens = mx.array([prompt(43, 0)])
    for name in ("qwen3_next", "qwen3_5"):
        assert mx.array_equal(paged_hybrid(name).module(tokens), build_hybrid(name)(tokens))


def test_contiguous_cache_gives_the_same() -> None:
    """VLLM_METAL_USE_PAGED_ATTENTION=0 is the same model."""
    model = paged_hybrid("qwen3_next")
    tokens = Driver(model, paged=False).run(prompts(), NEW_TOKENS, chunks=(7, 1, 16, 50))
    for request, text in prompts().items():
        check_tokens(tokens[request], reference(model.module, text, NEW_TOKENS))


@cache
def alone(name: str, length: int, seed: int, greedy: bool) -> tuple[list[int], list[np.ndarray]]:
    """Tokens and logits of one request by itself, its prompt in one chunk."""
    driver = HybridDriver(paged_hybrid(name))
    tokens = driver.run({"a": prompt(length, seed)}, NEW_TOKENS, sampling=GREEDY if greedy else SEEDED)["a"]
    rows = driver.recorder.logits["a"]
    return tokens, [rows[position] for position in range(length + NEW_TOKENS - 1)]


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    one_slot=st.booleans(),
    preempted=st.sets(st.tuples(st.integers(1, 12), st.integers(0, 4)), max_size=4),
    greedy=st.booleans(),
)
def test_batch_chunks_slots_and_preemption_change_nothing(
    name: str,
    lengths: list[int],
    chunks: list[int],
    one_slot: bool,
    preempted: set[tuple[int, int]],
    greedy: bool,
) -> None:
    driver = HybridDriver(paged_hybrid(name), BLOCK_SIZE, tokens_per_slot=ONE_SLOT if one_slot else BLOCK_SIZE)
    tokens = driver.run(
        {str(index): prompt(length, index) for index, length in enumerate(lengths)},
        NEW_TOKENS,
        sampling=GREEDY if greedy else SEEDED,
        chunks=chunks,
        preempt=lambda step: [str(request) for at, request in preempted if at == step],
    )
    for index, length in enumerate(lengths):
        want, rows = alone(name, length, index, greedy)
        got = np.stack([driver.recorder.logits[str(index)][position] for position in range(len(rows))])
        assert logit_error(got, np.stack(rows)) < BOUND
        assert tokens[str(index)] == want


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_cached_prefix_changes_nothing(name: str) -> None:
    """A request that goes on from the state another one left at a block boundary; the other goes on undisturbed."""
    shared, tail = prompt(32, 5), prompt(11, 6)
    driver = HybridDriver(paged_hybrid(name), BLOCK_SIZE, tokens_per_slot=BLOCK_SIZE)
    driver.run({"first": [*shared, 9]}, 1, chunks=(32,))
    attention, states = driver.runner.requests["first"].block_tables
    # As vLLM's MambaManager gives them: earlier slots are its null block, and the new one is private.
    tables = ((*attention[:4], 300, 301), (0, 0, 0, states[3], 302, 303))
    new = NewRequest("second", (*shared, *tail), len(shared) + len(tail), len(shared), tables, GREEDY)
    driver.runner.execute(Step({"second": len(tail)}, new=(new,)))
    hit = driver.runner.sample().read().token_ids[0]
    cold = HybridDriver(paged_hybrid(name), BLOCK_SIZE).run({"second": [*shared, *tail]}, 1)["second"]
    assert list(hit) == cold


def stage_of(name: str, cut: StageCut) -> StageModel:
    """A stage with nothing but its own parameters, as `load` leaves it."""
    module, model_type = build_hybrid(name), HYBRIDS[name]["model_type"]
    foreign = foreign_parameters(module, cut, model_type)
    parameters = tree_flatten(module.parameters())
    module.update(tree_unflatten([(path, blank(value)) for path, value in parameters if path in foreign]))
    return prepare_stage(module, model_type, cut)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5"])
def test_two_stages_give_what_the_whole_gives(name: str) -> None:
    """To the bit; each stage has an attention layer and two that keep states."""
    whole = HybridDriver(paged_hybrid(name), BLOCK_SIZE)
    want = whole.run(prompts(), NEW_TOKENS, chunks=(9, 1, 13))
    stages = [stage_of(name, StageCut(first, end, 6)) for first, end in ((0, 3), (3, 6))]
    assert [(len(stage.layers), len(stage.states)) for stage in stages] == [(1, 2), (1, 2)]
    backends = [
        hybrid_backend(stage, 512, BLOCK_SIZE, poisoned_states(single_group_states(stage.states, ONE_SLOT, 512, 1)))
        for stage in stages
    ]

    class Staged:
        def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
            passed = token_ids
            for stage, backend in zip(stages, backends, strict=True):
                passed = stage(passed, batch.positions, backend.prepare(batch), batch.logit_rows)
                mx.eval(passed, backend.arrays)
            return passed

        def release(self, request_ids: object) -> None:
            """The driver owns the blocks."""

    staged = HybridDriver(paged_hybrid(name), BLOCK_SIZE)
    staged.recorder.inner = Staged()
    assert staged.run(prompts(), NEW_TOKENS, chunks=(9, 1, 13)) == want
    for request, rows in whole.recorder.logits.items():
        for position, row in rows.items():
            np.testing.assert_array_equal(staged.recorder.logits[request][position], row)


def test_a_backend_without_states_is_refused() -> None:
    """A hybrid model over a backend for attention alone would have nowhere to keep its states."""
    driver = Driver(paged_hybrid("qwen3_5"))
    with pytest.raises(TypeError, match="GatheredStep does not"):
        driver.run(prompts(), 1)
