"""The same tokens whatever the engine does around them: batch, chunks, blocks, preemption, a cached prefix."""

from functools import cache

import numpy as np
import pytest
from equality import BOUND, logit_error
from hypothesis import given, settings
from hypothesis import strategies as st
from step_driver import GREEDY, Driver
from tiny_models import TINY, build

from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import NewRequest, Step

FAMILIES = ("llama", "gemma3_text", "gpt_oss", "deepseek_v2", "deepseek_v3")
NEW_TOKENS = 6
SEEDED = SamplingParams(temperature=0.8, top_p=0.9, seed=11)


@cache
def paged(name: str) -> PagedModel:
    return prepare(build(name), TINY[name]["model_type"])


def prompt(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 120, length).tolist()


@cache
def alone(name: str, length: int, seed: int, greedy: bool) -> tuple[list[int], list[np.ndarray]]:
    """Tokens and logits of one request by itself, its prompt in one chunk."""
    driver = Driver(paged(name), block_size=16)
    tokens = driver.run({"a": prompt(length, seed)}, NEW_TOKENS, sampling=GREEDY if greedy else SEEDED)["a"]
    rows = driver.recorder.logits["a"]
    return tokens, [rows[position] for position in range(length + NEW_TOKENS - 1)]


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    chunks=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    block_size=st.sampled_from([8, 16, 32]),
    preempted=st.sets(st.tuples(st.integers(1, 12), st.integers(0, 5)), max_size=4),
    greedy=st.booleans(),
)
def test_batch_chunks_blocks_and_preemption_change_nothing(
    name: str,
    lengths: list[int],
    chunks: list[int],
    block_size: int,
    preempted: set[tuple[int, int]],
    greedy: bool,
) -> None:
    sampling = GREEDY if greedy else SEEDED
    driver = Driver(paged(name), block_size)
    tokens = driver.run(
        {str(index): prompt(length, index) for index, length in enumerate(lengths)},
        NEW_TOKENS,
        sampling=sampling,
        chunks=chunks,
        preempt=lambda step: [str(request) for at, request in preempted if at == step],
    )
    for index, length in enumerate(lengths):
        want, rows = alone(name, length, index, greedy)
        got = np.stack([driver.recorder.logits[str(index)][position] for position in range(len(rows))])
        assert logit_error(got, np.stack(rows)) < BOUND
        assert tokens[str(index)] == want


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_prefix_changes_nothing(name: str) -> None:
    """A second request that shares blocks of the first starts behind them, and goes on as if it had computed them."""
    shared, block_size = prompt(32, 5), 8
    driver = Driver(paged(name), block_size)
    driver.run({"first": [*shared, 9]}, 1)
    tail = prompt(11, 6)
    tables = tuple((*driver.runner.requests["first"].block_tables[group][:4], 200 + group, 210 + group)
                   for group in range(len(driver.layout.groups)))  # fmt: skip
    new = NewRequest("second", (*shared, *tail), len(shared) + len(tail), len(shared), tables, GREEDY)
    driver.runner.execute(Step({"second": len(tail)}, new=(new,)))
    hit = driver.runner.sample().read().token_ids[0]
    cold = Driver(paged(name), block_size).run({"second": [*shared, *tail]}, 1)["second"]
    assert list(hit) == cold


def test_seeded_tokens_differ_from_greedy_ones() -> None:
    """Else the seeded runs above would prove nothing."""
    assert alone("llama", 20, 3, greedy=False)[0] != alone("llama", 20, 3, greedy=True)[0]
