"""A row whose last token is still on the device is sampled as if it were known."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.worker.sampling.edits import bar_bad_words
from pomarium.worker.sampling.logprobs import gather
from pomarium.worker.sampling.occurrences import Occurrences
from pomarium.worker.sampling.penalties import apply_penalties
from pomarium.worker.sampling.rows import SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams

VOCABULARY = 12

TOKENS = st.integers(0, VOCABULARY - 1)
WORDS = st.lists(st.lists(st.integers(0, VOCABULARY + 1), min_size=1, max_size=3).map(tuple), max_size=6).map(tuple)
PENALTIES = st.sampled_from([0.0, 0.4, 1.1])
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8]),
    top_p=st.sampled_from([1.0, 0.9]),
    seed=st.integers(0, 1 << 40),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=PENALTIES,
    frequency_penalty=PENALTIES,
    bad_words=WORDS,
    min_tokens=st.integers(0, 4),
    stop_token_ids=st.frozensets(TOKENS, max_size=3),
    num_logprobs=st.sampled_from([None, 0, 3, -1]),
    logprob_token_ids=st.sampled_from([None, None, (1, VOCABULARY, 4)]),
)


@dataclass(frozen=True)
class Given:
    """The same rows with every token known, and with some last ones unread."""

    logits: mx.array
    known: list[SamplingRow]
    late: list[SamplingRow]
    unread: mx.array


@st.composite
def given_rows(draw: st.DrawFn) -> Given:
    unread = draw(st.lists(TOKENS, min_size=1, max_size=4))
    known, late = [], []
    for number in range(draw(st.integers(1, 4))):
        prompt, output = draw(st.lists(TOKENS, min_size=1, max_size=4)), draw(st.lists(TOKENS, max_size=5))
        params = draw(PARAMS)
        place = draw(st.none() | st.integers(0, len(unread) - 1))
        for rows, last in ((known, lambda place: unread[place]), (late, lambda place: -1 - place)):
            tokens = prompt + output + ([] if place is None else [last(place)])
            rows.append(SamplingRow(str(number), params, tokens, len(prompt)))
    logits = np.random.default_rng(draw(st.integers(0, 99))).normal(size=(len(known), VOCABULARY)).astype(np.float32)
    return Given(mx.array(logits), known, late, mx.array(unread, dtype=mx.int32))


@given(given_rows())
@settings(max_examples=300, deadline=None)
def test_what_hangs_on_tokens_sees_the_unread_one(case: Given) -> None:
    for stage in (apply_penalties, bar_bad_words):
        want, got = stage(case.logits, case.known), stage(case.logits, case.late, case.unread)
        np.testing.assert_array_equal(np.array(got), np.array(want))


@given(given_rows())
@settings(max_examples=100, deadline=None)
def test_tokens_and_log_probabilities_are_those_of_known_rows(case: Given) -> None:
    sampler = Sampler(VOCABULARY, engine_seed=3)
    want = sampler.sample(case.logits, case.known)
    queued = sampler.queue(case.logits, case.late, None, case.unread)
    token_ids = np.array(queued.token_ids).tolist()
    assert token_ids == want.token_ids
    got = gather(queued.scored, token_ids)
    assert (got is None) == (want.logprobs is None)
    if got is not None and want.logprobs is not None:
        np.testing.assert_array_equal(got.token_ids, want.logprobs.token_ids)
        np.testing.assert_array_equal(got.logprobs, want.logprobs.logprobs)
        np.testing.assert_array_equal(got.ranks, want.logprobs.ranks)


@given(st.lists(TOKENS, min_size=1, max_size=30), st.integers(1, 30), st.booleans())
@settings(max_examples=200, deadline=None)
def test_occurrences_that_are_counted_step_by_step_are_those_of_the_whole(
    tokens: list[int], prompt: int, with_prompt: bool
) -> None:
    """Each last token is unread at first, and known in the next step."""
    prompt = min(prompt, len(tokens))
    growing, whole, first = Occurrences(), Occurrences(), 0 if with_prompt else prompt
    for end in range(prompt, len(tokens) + 1):
        growing.take([*tokens[:end], -1], first, prompt, VOCABULARY - 2)
    whole.take(tokens, first, prompt, VOCABULARY - 2)
    want = {token: tokens[prompt:].count(token) for token in tokens[first:] if token < VOCABULARY - 2}
    for counted in (growing, whole):
        assert dict(zip(counted.tokens.tolist(), counted.counts.tolist(), strict=True)) == want


def test_an_unread_token_that_nobody_gives_is_an_error() -> None:
    row = SamplingRow("a", SamplingParams(presence_penalty=1.0), [4, -1], 1)
    with pytest.raises(ValueError, match="step before"):
        apply_penalties(mx.zeros((1, VOCABULARY)), [row])


@pytest.mark.parametrize(
    ("mode", "params", "waits"),
    [
        ("raw_logprobs", SamplingParams(num_logprobs=2, repetition_penalty=1.2, bad_words=((1, 2),)), False),
        ("processed_logprobs", SamplingParams(num_logprobs=2), True),
        ("processed_logits", SamplingParams(logprob_token_ids=(3,)), True),
        ("processed_logprobs", SamplingParams(repetition_penalty=1.2), False),
    ],
)
def test_only_processed_log_probabilities_want_the_host(mode: str, params: SamplingParams, waits: bool) -> None:
    assert Sampler(VOCABULARY, 0, mode).on_device(params) is not waits  # type: ignore[arg-type]
