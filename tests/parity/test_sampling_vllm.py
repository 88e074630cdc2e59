"""Every sampling parameter against vLLM's own Sampler, on the same logits: processed logits, kept sets, greedy tokens,
log-probabilities and ranks."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sampling_rows import sampling_row
from vllm import SamplingParams as VllmParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler as VllmSampler

from pomarium.worker.sampling.full_row import keep
from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling.shortlist import filter_shortlist, most_likely, shortlist_size
from pomarium.worker.sampling.weights import exp_shifted
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import Grammar

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(autouse=True)
def _eager_torch() -> Iterator[None]:
    """vLLM compiles one rank-counting function; compiling it costs more than these tests."""
    with torch._dynamo.config.patch(disable=True):
        yield


def vllm_params(params: SamplingParams, structured: bool) -> VllmParams:
    made = VllmParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias) or None,
        allowed_token_ids=list(params.allowed_token_ids) if params.allowed_token_ids else None,
        min_tokens=params.min_tokens,
        stop_token_ids=sorted(params.stop_token_ids),
        max_tokens=1000,
        structured_outputs=StructuredOutputsParams(regex="a") if structured else None,
    )
    made._bad_words_token_ids = [list(word) for word in params.bad_words]
    return made


def vllm_metadata(rows: Sequence[SamplingRow], vocab_size: int, structured: Sequence[str] = ()) -> SamplingMetadata:
    """What vLLM's InputBatch makes of these requests (vllm/v1/worker/gpu_input_batch.py)."""
    params = [row.params for row in rows]
    cpu = torch.device("cpu")
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(rows)))
    processors = [
        MinTokensLogitsProcessor(config, cpu, False),
        LogitBiasLogitsProcessor(config, cpu, False),
        MinPLogitsProcessor(config, cpu, False),
    ]
    added = [
        (i, vllm_params(row.params, row.request_id in structured), list(row.prompt_token_ids), [*row.output_token_ids])
        for i, row in enumerate(rows)
    ]
    for processor in processors:
        processor.update_state(BatchUpdate(len(rows), removed=[], added=added, moved=[]))
    allowed = torch.zeros(len(rows), vocab_size, dtype=torch.bool)
    for i, p in enumerate(params):
        if p.allowed_token_ids:
            allowed[i] = True
            allowed[i, list(p.allowed_token_ids)] = False
    longest = max(len(row.prompt_token_ids) for row in rows)
    prompts = torch.full((len(rows), longest), vocab_size, dtype=torch.int64)
    for i, row in enumerate(rows):
        prompts[i, : len(row.prompt_token_ids)] = torch.tensor(row.prompt_token_ids)
    greedy = [p.greedy for p in params]
    counts = [vocab_size if p.num_logprobs == -1 else p.num_logprobs for p in params if p.num_logprobs is not None]

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32)

    return SamplingMetadata(
        temperature=None if all(greedy) else column([0.0 if p.greedy else p.temperature for p in params]),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=column([p.top_p for p in params]) if any(p.top_p < 1 for p in params) else None,
        top_k=torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], dtype=torch.int32)
        if any(0 < p.top_k < vocab_size for p in params)
        else None,
        generators={},
        max_num_logprobs=max(counts) if counts else None,
        no_penalties=all((p.repetition_penalty, p.frequency_penalty, p.presence_penalty) == (1, 0, 0) for p in params),
        prompt_token_ids=prompts,
        frequency_penalties=column([p.frequency_penalty for p in params]),
        presence_penalties=column([p.presence_penalty for p in params]),
        repetition_penalties=column([p.repetition_penalty for p in params]),
        output_token_ids=[list(row.output_token_ids) for row in rows],
        allowed_token_ids_mask=allowed if any(p.allowed_token_ids for p in params) else None,
        bad_words_token_ids={i: [list(w) for w in p.bad_words] for i, p in enumerate(params) if p.bad_words},
        logitsprocs=LogitsProcessors(processors),
        logprob_token_ids={i: list(p.logprob_token_ids) for i, p in enumerate(params) if p.logprob_token_ids} or None,
    )


def vllm_sample(
    logits: np.ndarray, rows: Sequence[SamplingRow], mode: str, structured: Sequence[str] = ()
) -> SamplerOutput:
    sampler = VllmSampler(logprobs_mode=mode)
    return sampler(torch.tensor(logits), vllm_metadata(rows, logits.shape[1], structured))


def dense(token_ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(R, V) out of the columns 1.. of whole-vocabulary log-probabilities."""
    out = np.full((token_ids.shape[0], token_ids.shape[1] - 1), np.nan, dtype=np.float32)
    np.put_along_axis(out, token_ids[:, 1:].astype(np.int64), scores[:, 1:], axis=1)
    return out


def processed(logits: np.ndarray, rows: Sequence[SamplingRow]) -> tuple[np.ndarray, np.ndarray]:
    """Processed logits (R, V) by vLLM and by us, of rows that ask for all log-probabilities."""
    theirs = vllm_sample(logits, rows, "processed_logits").logprobs_tensors
    ours = Sampler(logits.shape[1], 0, "processed_logits").sample(mx.array(logits), rows, None, None).logprobs
    assert ours is not None
    return (
        dense(theirs.logprob_token_ids.numpy(), theirs.logprobs.numpy()),
        dense(ours.token_ids, ours.logprobs),
    )


def random_logits(seed: int, rows: int, vocab_size: int, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, vocab_size)) * scale).astype(np.float32)


@st.composite
def batches(draw: Callable, filters: bool) -> tuple[np.ndarray, list[SamplingRow]]:
    """Logits (R, V) and rows with every editing parameter; with top_k and min_p too if `filters` (top_p has a test of
    its own, because equal sums must be kept apart)."""
    vocab_size = draw(st.integers(50, 500))
    token = st.integers(0, vocab_size - 1)
    tokens = st.lists(token, max_size=12).map(tuple)
    rows = []
    for i in range(draw(st.integers(1, 4))):
        output = draw(tokens)
        suffix = output[-1:] if draw(st.booleans()) else ()
        params = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])) if filters else 0.0,
            top_k=draw(st.sampled_from([0, 1, 5, vocab_size, vocab_size + 7])) if filters else 0,
            min_p=draw(st.sampled_from([0.0, 0.013])) if filters else 0.0,
            repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.7])),
            presence_penalty=draw(st.sampled_from([0.0, 0.9, -1.1])),
            frequency_penalty=draw(st.sampled_from([0.0, 0.4, -0.3])),
            logit_bias=draw(st.dictionaries(token, st.sampled_from([-100.0, 2.5, 100.0]), max_size=4)),
            allowed_token_ids=draw(st.none() | st.lists(token, min_size=1, max_size=30).map(tuple)),
            bad_words=(*draw(st.lists(st.tuples(token) | st.tuples(token, token), max_size=2)), (*suffix, draw(token))),
            min_tokens=draw(st.integers(0, 14)),
            stop_token_ids=frozenset(draw(st.lists(token, max_size=3))),
            num_logprobs=-1,
        )
        if params.greedy:
            params = SamplingParams(**{**vars(params), "top_k": 0, "min_p": 0.0})
        rows.append(sampling_row(f"r{i}", params, draw(tokens) or (0,), output))
    return random_logits(draw(st.integers(0, 2**32)), len(rows), vocab_size), rows


@QUICK
@given(batches(filters=False))
def test_edits_equal_vllm(batch: tuple[np.ndarray, list[SamplingRow]]) -> None:
    logits, rows = batch
    theirs, ours = processed(logits, rows)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


@QUICK
@given(batches(filters=False))
def test_greedy_tokens_and_raw_logprobs_equal_vllm(batch: tuple[np.ndarray, list[SamplingRow]]) -> None:
    logits, rows = batch
    theirs = vllm_sample(logits, rows, "raw_logprobs")
    ours = Sampler(logits.shape[1], 0).sample(mx.array(logits), rows, None, None)
    assert ours.token_ids == theirs.sampled_token_ids[:, 0].tolist()
    assert ours.logprobs is not None
    np.testing.assert_array_equal(ours.logprobs.ranks, theirs.logprobs_tensors.selected_token_ranks.numpy())
    np.testing.assert_allclose(ours.logprobs.logprobs, theirs.logprobs_tensors.logprobs.numpy(), atol=1e-5)
    np.testing.assert_array_equal(ours.logprobs.token_ids[:, 0], theirs.logprobs_tensors.logprob_token_ids[:, 0])


@QUICK
@given(batches(filters=True))
def test_min_p_and_top_k_keep_what_vllm_keeps(batch: tuple[np.ndarray, list[SamplingRow]]) -> None:
    logits, rows = batch
    theirs, ours = processed(logits, rows)
    for their, our in zip(theirs, ours, strict=True):
        top = np.max(our) if np.max(our) > -np.inf else 0.0
        near = np.abs(np.where(np.isfinite(their), their, our) - top - np.log(0.013)) < 1e-4
        np.testing.assert_allclose(our[~near], their[~near], rtol=1e-6, atol=1e-6)


def vllm_kept(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Bool (V,) of one row after vLLM's min_p, top_k and top_p."""
    row = torch.tensor(scaled)[None].clone()
    probabilities = torch.softmax(row, dim=-1)
    row[probabilities < probabilities.max() * min_p] = -torch.inf
    k = torch.tensor([top_k if 0 < top_k < len(scaled) else len(scaled)], dtype=torch.int32)
    return torch.isfinite(apply_top_k_top_p(row, k, torch.tensor([top_p])))[0].numpy()


def assume_clear_boundaries(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    """Discard rows where float32 rounding may decide on which side of top_p or min_p a token falls."""
    values = np.sort(scaled.astype(np.float64))[::-1]
    weights = np.exp(values - values[0])
    assume(np.min(np.abs(weights - min_p)) > 1e-5 * min_p or min_p == 0)
    weights = weights[weights >= min_p][: top_k or None]
    sums = np.cumsum(weights) / weights.sum()
    assume(top_p == 1 or np.min(np.abs(sums - top_p)) > 2e-6)


def shortlisted(scaled: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray | None:
    """Bool (V,) that the MLX shortlist keeps; None if it declares itself too short."""
    vocab_size = len(scaled)
    row, bounded = mx.array(scaled)[None], 0 < top_k < vocab_size
    size = shortlist_size(top_k if bounded else 0, vocab_size)
    ids, values = most_likely(row, size)
    mass = None if bounded or min_p > 0 or size == vocab_size else mx.sum(exp_shifted(row)[0], axis=-1, keepdims=True)
    weights, complete = filter_shortlist(
        values, mx.array([[top_k if bounded else size]]), mx.array([[top_p]]), mx.array([[min_p]]), mass
    )
    if size < vocab_size and not complete.item():
        return None
    kept = np.zeros(vocab_size, dtype=bool)
    kept[np.array(ids)[0][np.array(weights)[0] > 0]] = True
    return kept


@settings(QUICK, max_examples=100)
@given(
    seed=st.integers(0, 2**32),
    vocab_size=st.sampled_from([50, 257, 500, 9001]),
    scale=st.sampled_from([0.1, 1.0, 4.0]),
    top_k=st.sampled_from([0, 1, 7, 49, 300, 10**6]),
    top_p=st.sampled_from([1e-6, 0.2, 0.9, 0.97, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.4]),
)
def test_both_routes_keep_what_vllm_keeps(
    seed: int, vocab_size: int, scale: float, top_k: int, top_p: float, min_p: float
) -> None:
    scaled = random_logits(seed, 1, vocab_size, scale)[0]
    assume(len(np.unique(scaled)) == vocab_size or top_p == 1)
    top_k = min(top_k, vocab_size)
    assume_clear_boundaries(scaled, top_k, top_p, min_p)
    theirs = vllm_kept(scaled, top_k, top_p, min_p)
    np.testing.assert_array_equal(keep(scaled, top_k, top_p, min_p).masked() > -np.inf, theirs)
    ours = shortlisted(scaled, top_k, top_p, min_p)
    if ours is not None:
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("top_k", [0, 1, 10, 300])
@pytest.mark.parametrize("top_p", [0.35, 0.8, 1.0])
def test_ties_keep_as_many_of_each_likelihood_as_vllm(top_k: int, top_p: float) -> None:
    """With top_k all tokens that tie with the k-th stay; which part of a tie top_p keeps is arbitrary in vLLM."""
    scaled = np.random.default_rng(5).integers(-4, 5, 700).astype(np.float32)
    theirs = scaled[vllm_kept(scaled, top_k, top_p, 0.0)]
    np.testing.assert_array_equal(np.sort(scaled[keep(scaled, top_k, top_p, 0.0).masked() > -np.inf]), np.sort(theirs))
    ours = shortlisted(scaled, top_k, top_p, 0.0)
    if ours is not None:
        np.testing.assert_array_equal(np.sort(scaled[ours]), np.sort(theirs))


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
@pytest.mark.parametrize("k", [0, 1, 5, -1])
def test_logprobs_modes_equal_vllm(mode: str, k: int) -> None:
    logits = random_logits(3, 3, 211)
    params = SamplingParams(temperature=0.7, top_k=1, num_logprobs=k, frequency_penalty=0.5)
    rows = [sampling_row(f"r{i}", params, (1, 2), (int(np.argmax(logits[i])),) * 40) for i in range(3)]
    theirs = vllm_sample(logits, rows, mode).logprobs_tensors
    ours = Sampler(211, 0, mode).sample(mx.array(logits), rows, None, None).logprobs
    assert ours is not None
    assert ours.token_ids.shape == tuple(theirs.logprob_token_ids.shape)
    np.testing.assert_array_equal(ours.ranks, theirs.selected_token_ranks.numpy())
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs.numpy(), atol=1e-5)
    finite = np.isfinite(ours.logprobs)
    np.testing.assert_array_equal(ours.token_ids[finite], theirs.logprob_token_ids.numpy()[finite])


def test_named_logprobs_equal_vllm() -> None:
    logits = random_logits(4, 2, 97)
    rows = [
        sampling_row("a", SamplingParams(temperature=0, logprob_token_ids=(5, 90, 5)), (1,), ()),
        sampling_row("b", SamplingParams(temperature=0, logprob_token_ids=(7,)), (1,), ()),
    ]
    theirs = vllm_sample(logits, rows, "raw_logprobs").logprobs_tensors
    ours = Sampler(97, 0).sample(mx.array(logits), rows, None, None).logprobs
    assert ours is not None
    np.testing.assert_array_equal(ours.token_ids, theirs.logprob_token_ids.numpy())
    np.testing.assert_array_equal(ours.ranks, theirs.selected_token_ranks.numpy())
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs.numpy(), atol=1e-5)


def test_prompt_logprobs_equal_vllm() -> None:
    logits = random_logits(8, 9, 301)
    tokens = np.random.default_rng(1).integers(0, 301, 9)
    theirs = VllmSampler.gather_logprobs(VllmSampler.compute_logprobs(torch.tensor(logits)), 4, torch.tensor(tokens))
    ours = Sampler(301, 0).prompt_logprobs(mx.array(logits), tokens.tolist(), 4)
    np.testing.assert_array_equal(ours.token_ids, theirs.logprob_token_ids.numpy())
    np.testing.assert_array_equal(ours.ranks, theirs.selected_token_ranks.numpy())
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs.numpy(), atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_ranks_count_ties_as_vllm(tied: bool) -> None:
    logits = np.zeros((1, 40), dtype=np.float32)
    logits[0, 7] = 0.0 if tied else 1.0
    rows = [sampling_row("a", SamplingParams(temperature=0, num_logprobs=2), (1,), ())]
    theirs = vllm_sample(logits, rows, "raw_logprobs")
    ours = Sampler(40, 0).sample(mx.array(logits), rows, None, None)
    assert ours.logprobs is not None
    assert ours.logprobs.ranks.tolist() == theirs.logprobs_tensors.selected_token_ranks.tolist() == [40 if tied else 1]
    assert ours.token_ids == theirs.sampled_token_ids[:, 0].tolist()


@pytest.mark.parametrize("stops", [{3}, {3, 4}])
def test_min_tokens_spares_the_only_token_of_a_grammar_as_vllm(stops: set[int]) -> None:
    """The grammar admits 3 alone, which is also a stop token held back by min_tokens."""
    words = np.zeros(2, dtype=np.uint32)
    words[0] = 1 << 3
    logits = random_logits(2, 1, 60)
    masked = np.where(np.arange(60) == 3, logits, -np.inf).astype(np.float32)
    params = SamplingParams(temperature=0, min_tokens=5, stop_token_ids=frozenset(stops))
    row = sampling_row("a", params, (1,), ())
    theirs = vllm_sample(masked, [row], "raw_logprobs", structured=["a"])
    ours = Sampler(60, 0).sample(mx.array(logits), [row], Grammar({"a": words}), None)
    assert ours.token_ids == theirs.sampled_token_ids[:, 0].tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_draw_gives_token_0_as_vllm(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, allowed_token_ids=(5,), bad_words=((5,),), top_k=3, top_p=0.9)
    if params.greedy:
        params = SamplingParams(temperature=0, allowed_token_ids=(5,), bad_words=((5,),))
    row = sampling_row("a", params, (1,), ())
    logits = random_logits(2, 1, 60)
    theirs = vllm_sample(logits, [row], "raw_logprobs")
    assert Sampler(60, 0).sample(mx.array(logits), [row], None, None).token_ids == [0]
    assert theirs.sampled_token_ids[:, 0].tolist() == [0]
