"""Corner cases of sampling: nothing out of range, nothing that is barred, no row that fails the batch."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_rows import sampling_row

from pomarium.worker.sampling.draw import pick, pick_in_blocks
from pomarium.worker.sampling.full_row import keep
from pomarium.worker.sampling.grammar import bars_of
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling.shortlist import most_likely
from pomarium.worker.sampling.weights import exp_shifted, log_softmax
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import Grammar


def sample(logits: np.ndarray, params: Sequence[SamplingParams], grammar: Grammar | None = None) -> list[int]:
    rows = [sampling_row(f"r{i}", p, (1, 2), (3,)) for i, p in enumerate(params)]
    return Sampler(logits.shape[1], 0).sample(mx.array(logits), rows, grammar, None).token_ids


def noise(rows: int, vocab_size: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(vocab_size).standard_normal((rows, vocab_size)) * scale).astype(np.float32)


ROUTES = [
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(min_p=0.1),
    SamplingParams(top_k=3),
    SamplingParams(top_p=0.9),
    SamplingParams(top_p=0.99, temperature=5.0),
    SamplingParams(top_k=20, top_p=0.5, min_p=0.01),
]


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 33, 255, 256, 257, 999, 4099, 8193, 8200])
@pytest.mark.parametrize("params", ROUTES)
def test_masked_tokens_are_never_drawn(vocab_size: int, params: SamplingParams) -> None:
    logits = noise(64, vocab_size)
    barred = np.random.default_rng(0).random((64, vocab_size)) < 0.9
    barred[:, -1] = False
    logits[barred] = -np.inf
    for i, token in enumerate(sample(logits, [SamplingParams(**{**vars(params), "seed": i}) for i in range(64)])):
        assert 0 <= token < vocab_size
        assert not barred[i, token]


@pytest.mark.parametrize("params", ROUTES)
@pytest.mark.parametrize("value", [-np.inf, np.nan])
def test_a_row_without_finite_logits_gives_token_0_and_spares_the_others(params: SamplingParams, value: float) -> None:
    logits = noise(3, 5000)
    before = sample(logits, [params] * 3)
    logits[1] = value
    after = sample(logits, [params] * 3)
    assert (after[0], after[2]) == (before[0], before[2])
    assert 0 <= after[1] < 5000
    assert after[1] == 0 or np.isnan(value)


def test_no_rows() -> None:
    assert Sampler(10, 0).sample(mx.zeros((0, 10)), [], None, None).token_ids == []


@pytest.mark.parametrize("top_k", [10, 11, 10**6])
def test_top_k_of_the_whole_vocabulary_changes_nothing(top_k: int) -> None:
    logits = noise(20, 10)
    with_k = [SamplingParams(top_k=top_k, seed=i) for i in range(20)]
    assert sample(logits, with_k) == sample(logits, [SamplingParams(seed=i) for i in range(20)])


@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_p=1e-9), SamplingParams(top_k=1), SamplingParams(min_p=1.0), SamplingParams(temperature=1e-5)],
)
@pytest.mark.parametrize("vocab_size", [50, 3000])
def test_the_narrowest_filters_are_greedy(params: SamplingParams, vocab_size: int) -> None:
    logits = noise(30, vocab_size)
    rows = [SamplingParams(**{**vars(params), "seed": i}) for i in range(30)]
    assert sample(logits, rows) == np.argmax(logits, axis=1).tolist()


def test_huge_temperature_is_uniform() -> None:
    tokens = sample(
        np.tile(noise(1, 16, 5.0), (4000, 1)), [SamplingParams(temperature=1e6, seed=i) for i in range(4000)]
    )
    assert np.all(np.abs(np.bincount(tokens, minlength=16) - 250) < 5 * np.sqrt(250))


def test_ties_beyond_the_shortlist_are_all_kept_by_top_k() -> None:
    """2000 equal tokens at the k-th place do not fit in the shortlist of 256: the row is redone in full."""
    logits = np.zeros((600, 3000), dtype=np.float32)
    logits[:, 2000:] = -5
    tokens = sample(logits, [SamplingParams(top_k=4, seed=i) for i in range(600)])
    assert max(tokens) < 2000
    assert len(set(tokens)) > 450


def test_greedy_takes_the_first_of_equals() -> None:
    assert sample(np.array([[0, 2, 2, 1]], dtype=np.float32), [SamplingParams(temperature=0)]) == [1]


def test_padded_logits_are_cut() -> None:
    logits = np.zeros((1, 128), dtype=np.float32)
    logits[0, 100:] = 50
    rows = [sampling_row("a", SamplingParams(temperature=0, num_logprobs=-1), (1,), ())]
    sampled = Sampler(100, 0).sample(mx.array(logits), rows, None, None)
    assert sampled.token_ids == [0]
    assert sampled.logprobs is not None
    assert sampled.logprobs.token_ids.shape == (1, 101)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_logits(dtype: mx.Dtype) -> None:
    logits = mx.array(noise(4, 300)).astype(dtype)
    rows = [sampling_row("a", SamplingParams(temperature=0), (1,), ())] * 4
    assert Sampler(300, 0).sample(logits, rows, None, None).token_ids == (
        np.argmax(np.array(logits.astype(mx.float32)), axis=1).tolist()
    )


def test_ids_outside_the_vocabulary_are_ignored() -> None:
    strange = (-1, 50, 2**31, 2**40)
    params = SamplingParams(
        temperature=0, min_tokens=9, stop_token_ids=frozenset(strange), bad_words=((-5,), (60,)),
        logit_bias={-2: 100.0, 50: 100.0}, repetition_penalty=1.5, frequency_penalty=0.1,
        logprob_token_ids=(49, 50), allowed_token_ids=(-1, 7, 50),
    )  # fmt: skip
    row = sampling_row("a", params, strange, strange)
    sampled = Sampler(50, 0).sample(mx.array(noise(1, 50)), [row], None, None)
    assert sampled.token_ids == [7]
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprobs[0, 2] == -np.inf


@given(st.integers(1, 200), st.data())
@settings(max_examples=40, deadline=None)
def test_grammar_bits(vocab_size: int, data: st.DataObject) -> None:
    allowed = data.draw(st.sets(st.integers(0, vocab_size - 1)))
    words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
    for token in allowed:
        words[token // 32] |= np.uint32(1 << (token % 32))
    for mask in (words, words.view(np.int32)):
        assert set(np.flatnonzero(bars_of(mask, vocab_size) == 0).tolist()) == allowed
    assert np.all(bars_of(words, vocab_size + 40)[vocab_size:] == -np.inf)


def test_a_grammar_binds_its_own_request_and_the_raw_logprobs() -> None:
    logits = noise(3, 70)
    words = np.array([0, 1 << 4, 0], dtype=np.uint32)
    rows = [sampling_row(name, SamplingParams(temperature=0, num_logprobs=1), (1,), ()) for name in "abc"]
    sampled = Sampler(70, 0).sample(mx.array(logits), rows, Grammar({"b": words, "gone": words}), None)
    best = np.argmax(logits, axis=1)
    assert sampled.token_ids == [best[0], 36, best[2]]
    assert sampled.logprobs is not None
    assert sampled.logprobs.logprobs[1].tolist() == [0.0, 0.0]
    assert sampled.logprobs.ranks.tolist() == [1, 1, 1]


def test_mixed_logprobs_share_the_widest_table() -> None:
    logits = noise(4, 90)
    asked = [{"num_logprobs": 2}, {}, {"logprob_token_ids": (8, 9, 10)}, {"num_logprobs": 0}]
    rows = [sampling_row(f"r{i}", SamplingParams(temperature=0, **a), (1,), ()) for i, a in enumerate(asked)]
    table = Sampler(90, 0).sample(mx.array(logits), rows, None, None).logprobs
    assert table is not None
    assert table.token_ids.shape == table.logprobs.shape == (4, 4)
    order = np.argsort(-logits, axis=1)
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True))
    assert table.token_ids[0].tolist() == [order[0, 0], order[0, 0], order[0, 1], 0]
    assert table.token_ids[2].tolist() == [order[2, 0], 8, 9, 10]
    assert table.token_ids[:, 0].tolist() == order[:, 0].tolist()
    np.testing.assert_allclose(table.logprobs[0, :3], exact[0, table.token_ids[0, :3]], atol=1e-5)
    np.testing.assert_allclose(table.logprobs[2], exact[2, table.token_ids[2]], atol=1e-5)
    assert table.logprobs[0, 3] == table.logprobs[3, 1] == -np.inf
    assert table.ranks.tolist() == [1, 0, 1, 1]
    assert (table.token_ids.dtype, table.logprobs.dtype, table.ranks.dtype) == (np.int32, np.float32, np.int64)


def test_prompt_logprobs_of_no_positions() -> None:
    table = Sampler(30, 0).prompt_logprobs(mx.zeros((0, 30)), [], 3)
    assert table.token_ids.shape == table.logprobs.shape == (0, 4)


@pytest.mark.parametrize("vocab_size", [300, 5003, 49152])
@pytest.mark.parametrize("size", [1, 17, 256])
def test_most_likely_is_the_head_of_the_sorted_row(vocab_size: int, size: int) -> None:
    logits = noise(2, vocab_size)
    ids, values = most_likely(mx.array(logits), size)
    np.testing.assert_array_equal(np.array(ids), np.argsort(-logits, axis=1, kind="stable")[:, :size])
    np.testing.assert_array_equal(np.array(values), -np.sort(-logits, axis=1)[:, :size])


def test_exp_shifted_is_exact_enough() -> None:
    logits = np.concatenate([np.linspace(-88, 0, 100001), [-np.inf, -1e9, -200]]).astype(np.float32)[None]
    weights = np.array(exp_shifted(mx.array(logits))[0])[0]
    exact = np.exp(logits[0].astype(np.float64))
    visible = exact > 1e-37
    np.testing.assert_allclose(weights[visible], exact[visible], rtol=1e-5)
    np.testing.assert_allclose(weights[exact > 1e-8], exact[exact > 1e-8], rtol=2e-6)
    assert weights[-3:].tolist() == [0, 0, 0]
    assert np.all(weights >= 0)


def test_log_softmax_of_a_dead_row_is_not_nan() -> None:
    rows = np.stack([np.full(9, -np.inf), np.arange(9)]).astype(np.float32)
    scores = np.array(log_softmax(mx.array(rows)))
    assert np.all(scores[0] == -np.inf)
    assert np.exp(scores[1]).sum() == pytest.approx(1, abs=1e-5)


def test_pick_never_takes_zero_weights_at_either_end() -> None:
    weights = mx.array([[0.0, 1e-45, 0.0, 3.0, 0.0]] * 2 + [[0.0] * 5, [float("nan")] * 5])
    uniforms = mx.array([[0.0], [1 - 2.0**-24], [0.5], [0.5]])
    assert pick(weights, uniforms).tolist()[:3] == [1, 3, 0]
    assert 0 <= pick(weights, uniforms).tolist()[3] < 5


def test_small_weights_keep_their_share_of_a_large_vocabulary() -> None:
    """262144 tokens of one billionth of the first one's weight each: a single float32 running sum would drop them."""
    vocab_size, rows = 262144, 40
    weights = np.full((1, vocab_size), 4e-9, dtype=np.float32)
    weights[0, 0] = 4e-9 * vocab_size
    uniforms = np.random.default_rng(0).random((rows, 2)).astype(np.float32)
    batch = mx.broadcast_to(mx.array(weights), (rows, vocab_size))
    tokens = np.array(pick_in_blocks(batch, mx.array(uniforms)))
    # Half of the mass is the first token's and lies in the first block.
    assert np.count_nonzero(tokens == 0) == np.count_nonzero(uniforms[:, 0] < 0.5)
    np.testing.assert_allclose(tokens[tokens > 0] / vocab_size, uniforms[tokens > 0, 0] * 2 - 1, atol=2e-3)


def test_full_row_reference_keeps_the_lower_ids_of_a_tie() -> None:
    row = np.array([1, 3, 1, 1, 2], dtype=np.float32)
    p = np.exp(row) / np.exp(row).sum()
    kept = keep(row, 0, float(p[1] + p[4] + p[0] * 1.5), 0.0)
    assert np.flatnonzero(kept.masked() > -np.inf).tolist() == [0, 1, 2, 4]
    assert [kept.draw(u) for u in (0.0, 0.999999)] == [1, 2]
