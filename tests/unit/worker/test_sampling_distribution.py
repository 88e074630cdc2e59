"""Draws follow the exact distribution, and depend on nothing but (seed, position) and the row itself."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from sampling_rows import sampling_row

from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling.uniforms import random_bits, request_seed, uniform, uniform_pairs
from pomarium.worker.sampling_params import SamplingParams

FILTERS = {
    "plain": SamplingParams(),
    "cool": SamplingParams(temperature=0.6),
    "hot": SamplingParams(temperature=1.8),
    "top_k": SamplingParams(top_k=12),
    "top_p": SamplingParams(top_p=0.8),
    "min_p": SamplingParams(min_p=0.05),
    "top_k and top_p": SamplingParams(temperature=1.3, top_k=40, top_p=0.7),
    "min_p and top_p": SamplingParams(temperature=1.3, min_p=0.02, top_p=0.9),
    "all": SamplingParams(temperature=0.9, min_p=0.01, top_k=30, top_p=0.95),
}


def expected(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Exact probabilities (V,), float64, written down from the definitions."""
    scaled = logits.astype(np.float64) / params.temperature
    p = np.exp(scaled - scaled.max())
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= params.top_p]] = 0
    return p / p.sum()


def rejected(counts: np.ndarray, p: np.ndarray) -> bool:
    """Pearson's chi-square test at 4 sigma (Wilson-Hilferty), bins below 8 expected pooled."""
    mean = p * counts.sum()
    small = mean < 8
    seen = np.append(counts[~small], counts[small].sum())
    mean = np.append(mean[~small], mean[small].sum())
    seen, mean = seen[mean > 0], mean[mean > 0]
    degrees = len(mean) - 1
    statistic = float(np.sum((seen - mean) ** 2 / mean))
    deviate = ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / np.sqrt(2 / (9 * degrees))
    return bool(deviate > 4)


def drawn(logits: np.ndarray, params: SamplingParams, seeds: Sequence[int], positions: Sequence[int]) -> list[int]:
    rows = [
        sampling_row(f"r{seed}", replace(params, seed=seed), range(position), ())
        for seed, position in zip(seeds, positions, strict=True)
    ]
    batch = mx.broadcast_to(mx.array(logits), (len(rows), len(logits)))
    return Sampler(len(logits), 0).sample(batch, rows, None, None).token_ids


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize("vocab_size", [45, 700])
def test_frequencies_over_positions_and_seeds(name: str, vocab_size: int) -> None:
    logits = (np.random.default_rng(vocab_size).standard_normal(vocab_size) * 1.5).astype(np.float32)
    p = expected(logits, FILTERS[name])
    one_seed = drawn(logits, FILTERS[name], [-7] * 3000, range(3000))
    one_position = drawn(logits, FILTERS[name], range(-1500, 1500), [9] * 3000)
    for tokens in (one_seed, one_position):
        counts = np.bincount(tokens, minlength=vocab_size)
        assert counts[p == 0].sum() == 0
        assert not rejected(counts, p)


def test_the_frequency_test_can_fail() -> None:
    logits = (np.random.default_rng(45).standard_normal(45) * 1.5).astype(np.float32)
    counts = np.bincount(drawn(logits, SamplingParams(temperature=1.25), [0] * 3000, range(3000)), minlength=45)
    assert rejected(counts, expected(logits, SamplingParams()))


def test_nucleus_longer_than_the_shortlist() -> None:
    """A flat row overflows the shortlist and is drawn on the host, from the same distribution."""
    vocab_size, params = 20000, SamplingParams(top_p=0.95)
    logits = (np.random.default_rng(0).standard_normal(vocab_size) * 0.5).astype(np.float32)
    p = expected(logits, params)
    assert np.count_nonzero(p) > 8192
    tokens = np.array(drawn(logits, params, [3] * 400, range(400)))
    assert np.all(p[tokens] > 0)
    # By likelihood, in ten bins of equal mass.
    order = np.argsort(-p)
    bins = np.empty(vocab_size, dtype=int)
    bins[order] = np.minimum((np.cumsum(p[order]) * 10).astype(int), 9)
    assert not rejected(np.bincount(bins[tokens], minlength=10), np.bincount(bins, weights=p, minlength=10))


def mixed_rows() -> list[SamplingRow]:
    params = [*FILTERS.values(), SamplingParams(temperature=0), SamplingParams(top_p=0.999, temperature=3.0)]
    return [
        sampling_row(f"r{i}", replace(p, seed=(None, i, -(2**63))[i % 3]), range(5 + i), range(i))
        for i, p in enumerate(params * 2)
    ]


def test_tokens_do_not_depend_on_the_batch() -> None:
    rows, vocab_size = mixed_rows(), 2000
    logits = (np.random.default_rng(1).standard_normal((len(rows), vocab_size)) * 2).astype(np.float32)
    sampler = Sampler(vocab_size, 11)
    together = sampler.sample(mx.array(logits), rows, None, None).token_ids
    alone = [sampler.sample(mx.array(logits[i : i + 1]), [row], None, None).token_ids[0] for i, row in enumerate(rows)]
    assert together == alone
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(rows))[: 22 - 5 * seed]
        part = sampler.sample(mx.array(logits[order]), [rows[i] for i in order], None, None).token_ids
        assert part == [together[i] for i in order]


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_tokens_do_not_depend_on_who_asks_for_logprobs(mode: str) -> None:
    rows = [r for r in mixed_rows() if not r.params.greedy]
    logits = mx.array((np.random.default_rng(1).standard_normal((len(rows), 800)) * 2).astype(np.float32))
    asking = [replace(row, params=replace(row.params, num_logprobs=3)) for row in rows[:5]] + rows[5:]
    sampler = Sampler(800, 11, mode)
    assert (
        sampler.sample(logits, rows, None, None).token_ids[5:]
        == (sampler.sample(logits, asking, None, None).token_ids[5:])
    )


def test_a_resumed_request_draws_the_same_token() -> None:
    """After preemption or on another replica the same tokens may come as prompt: only the position counts."""
    logits = mx.array((np.random.default_rng(1).standard_normal((1, 400))).astype(np.float32))
    params = SamplingParams(seed=5)
    before = Sampler(400, 1).sample(logits, [sampling_row("a", params, (1, 2), (3, 4))], None, None)
    after = Sampler(400, 2).sample(logits, [sampling_row("b", params, (1, 2, 3, 4), ())], None, None)
    assert before.token_ids == after.token_ids


def test_requests_without_a_seed_differ_by_id_and_engine_seed() -> None:
    logits = np.zeros((1, 4000), dtype=np.float32)

    def token(engine_seed: int, request_id: str) -> int:
        row = sampling_row(request_id, SamplingParams(), (1,), ())
        return Sampler(4000, engine_seed).sample(mx.array(logits), [row], None, None).token_ids[0]

    assert token(0, "a") == token(0, "a")
    assert len({token(0, "a"), token(0, "b"), token(1, "a"), token(-1, "a")}) == 4


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1])
def test_any_64_bit_seed_gives_uniforms(seed: int) -> None:
    bits = random_bits([seed] * 20000, range(20000))
    pairs = uniform_pairs(bits)
    assert pairs.dtype == np.float32
    assert 0 <= pairs.min() <= pairs.max() < 1
    assert not rejected(np.bincount((pairs[:, 0] * 64).astype(int), minlength=64), np.full(64, 1 / 64))
    cells = (pairs * 8).astype(int)
    assert not rejected(np.bincount(cells[:, 0] * 8 + cells[:, 1], minlength=64), np.full(64, 1 / 64))
    follow = (pairs[:-1, 0] * 8).astype(int) * 8 + (pairs[1:, 0] * 8).astype(int)
    assert not rejected(np.bincount(follow, minlength=64), np.full(64, 1 / 64))


def test_the_random_function_is_pinned() -> None:
    """A change here changes every seeded answer: SplitMix64's published outputs for state 0 start with these two."""
    assert uniform((1 << 64) - 1) < 1
    assert [hex(b) for b in random_bits([0, 0, -1], [0, 1, 5])] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0xe4e5eb29dbd0321",
    ]
    assert request_seed(0, "a") == request_seed(2**64, "a") != request_seed(0, "b")
