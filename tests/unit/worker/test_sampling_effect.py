"""Every sampling parameter has an effect: reset any one of them to its default and the outcome differs.

The case is built so that each parameter matters: processed logits of the whole vocabulary are the outcome, plus the
token where only the draw is concerned.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sampling_rows import sampling_row

from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams

VOCAB_SIZE = 120
ALL = SamplingParams(
    temperature=0.8,
    top_p=0.97,
    top_k=20,
    seed=3,
    repetition_penalty=1.2,
    presence_penalty=0.3,
    frequency_penalty=0.2,
    logit_bias={5: 2.0},
    allowed_token_ids=tuple(range(100)),
    bad_words=((8, 6), (9, 7)),
    min_tokens=10,
    stop_token_ids=frozenset({4}),
    num_logprobs=-1,
    extra_args={"boost": 11},
)
# min_p and top_k both cut a prefix of the order by likelihood, so only the shorter of the two can show.
WITH_MIN_P = replace(ALL, top_k=0, min_p=0.04)
LOGITS = (np.random.default_rng(2).standard_normal((1, VOCAB_SIZE)) * 0.5).astype(np.float32)
LOGITS[0, [4, 5, 6, 10, 11]] = 2.5
LOGITS[0, 110] = 2.0
DRAWN_ONLY = {"seed"}
ELSEWHERE = {
    "num_prompt_logprobs": "read by the model runner, see test_prompt_logprobs_equal_vllm",
    "num_logprobs": "below: without it nothing is reported",
    "logprob_token_ids": "below: it replaces num_logprobs",
}


class Boost:
    """A custom processor that reads `extra_args`, and sees the logits before the penalties."""

    def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
        for i, row in enumerate(rows):
            if row.params.extra_args:
                logits[i, row.params.extra_args["boost"]] += 1
        return logits


def outcome(params: SamplingParams) -> tuple[list[int], np.ndarray]:
    """Tokens over 40 positions, and the processed logits of the first (V,)."""
    rows = [sampling_row("a", params, (1, 10, *[2] * i), (10, 10, 8)) for i in range(40)]
    sampler = Sampler(VOCAB_SIZE, 0, "processed_logits")
    sampled = sampler.sample(mx.array(np.repeat(LOGITS, 40, axis=0)), rows, None, Boost())
    assert sampled.logprobs is not None
    processed = np.empty(VOCAB_SIZE, dtype=np.float32)
    processed[sampled.logprobs.token_ids[0, 1:]] = sampled.logprobs.logprobs[0, 1:]
    return sampled.token_ids, processed


@pytest.mark.parametrize("name", [f.name for f in fields(SamplingParams) if f.name not in ELSEWHERE])
def test_each_parameter_has_an_effect(name: str) -> None:
    default: Any = getattr(SamplingParams(), name)
    case = WITH_MIN_P if name == "min_p" else ALL
    assert getattr(case, name) != default, f"{name} is not exercised"
    tokens, processed = outcome(case)
    other_tokens, other_processed = outcome(replace(case, **{name: default}))
    if name in DRAWN_ONLY:
        assert tokens != other_tokens
    else:
        assert not np.array_equal(processed, other_processed)


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "min_p", "seed"])
def test_each_parameter_of_the_draw_changes_tokens(name: str) -> None:
    """On the MLX routes, which report nothing: two vocabularies, so that shortlists are partial in one."""
    for vocab_size in (120, 3000):
        logits = (np.random.default_rng(4).standard_normal((1, vocab_size)) * 2).astype(np.float32)
        logits = np.repeat(logits, 300, axis=0)
        strict = {"temperature": 0.5, "top_p": 0.6, "top_k": 6, "min_p": 0.3, "seed": 8}
        alone = SamplingParams(**{"seed": 1, name: strict[name]})
        tokens = [
            Sampler(vocab_size, 0)
            .sample(mx.array(logits), [sampling_row("a", p, range(i), ()) for i in range(300)], None, None)
            .token_ids
            for p in (alone, SamplingParams(seed=1))
        ]
        assert tokens[0] != tokens[1]


def test_logprobs_parameters() -> None:
    def reported(params: SamplingParams) -> Any:
        rows = [sampling_row("a", params, (1,), ())]
        return Sampler(VOCAB_SIZE, 0).sample(mx.array(LOGITS), rows, None, None).logprobs

    assert reported(SamplingParams(temperature=0)) is None
    assert reported(SamplingParams(temperature=0, num_logprobs=2)).token_ids.shape == (1, 3)
    named = reported(SamplingParams(temperature=0, num_logprobs=2, logprob_token_ids=(50, 60)))
    assert named.token_ids[0, 1:].tolist() == [50, 60]


def test_custom_processors_come_before_penalties_and_invariant_ones_after_temperature() -> None:
    seen: list[np.ndarray] = []

    class Spy:
        def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
            seen.append(logits.copy())
            return logits

    params = SamplingParams(temperature=0.5, min_p=0.2, presence_penalty=0.5, logit_bias={3: 1.0})
    rows = [sampling_row("a", params, (1,), (10,)), sampling_row("b", SamplingParams(temperature=0), (1,), ())]
    logits = np.repeat(LOGITS, 2, axis=0)
    Sampler(VOCAB_SIZE, 0).sample(mx.array(logits), rows, None, Spy(), Spy())
    first, second = seen
    assert first[0, 3] == pytest.approx(LOGITS[0, 3] + 1)
    assert first[0, 10] == LOGITS[0, 10]
    assert second[0, 10] == pytest.approx((LOGITS[0, 10] - 0.5) / 0.5)
    assert np.count_nonzero(np.isneginf(second[0])) > 0
    np.testing.assert_array_equal(second[1], LOGITS[0])


def test_an_invariant_processor_decides_for_random_rows_only() -> None:
    class Only7:
        def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
            only = np.full_like(logits, -np.inf)
            only[:, 7] = 0
            return only

    rows = [
        sampling_row("a", SamplingParams(temperature=2.0), (1,), ()),
        sampling_row("b", SamplingParams(temperature=0), (1,), ()),
    ]
    tokens = Sampler(VOCAB_SIZE, 0).sample(mx.array(np.repeat(LOGITS, 2, axis=0)), rows, None, None, Only7()).token_ids
    assert tokens == [7, int(np.argmax(LOGITS))]
