"""Tokens that come back from the last stage end in the right places, whatever was preempted or finished meanwhile."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.pipeline.returned import ReturnedTokens
from pomarium.worker.requests import RequestState
from pomarium.worker.sampling_params import SamplingParams


def request(name: str, tokens: Sequence[int]) -> RequestState:
    return RequestState(name, list(tokens), len(tokens), 0, [[1]], SamplingParams())


class LastStage:
    """Token of the i-th sampler of step n is 1000 n + i; steps must be asked for in order, each once."""

    def __init__(self) -> None:
        self.sampled: dict[int, int] = {}
        self.asked: list[int] = []

    def receive(self, step: int) -> list[int]:
        assert not self.asked or step > self.asked[-1]
        self.asked.append(step)
        return [1000 * step + index for index in range(self.sampled[step])]


@given(st.integers(0, 2**32), st.integers(2, 6))
def test_every_place_is_filled_before_its_request_is_computed_again(seed: int, depth: int) -> None:
    """Steps pick requests at random; some are preempted (their list is replaced by the true tokens) or finish."""
    rng, last = random.Random(seed), LastStage()
    returned = ReturnedTokens(last.receive, depth)
    live = [request(f"r{number}", [1, 2]) for number in range(4)]
    truth = {state.id: [1, 2] for state in live}
    for step in range(40):
        chosen = rng.sample(live, rng.randint(0, len(live)))
        if not chosen:
            continue
        returned.settle(step, chosen)
        for state in chosen:
            assert state.token_ids == truth[state.id]
        samplers = [state for state in chosen if rng.random() < 0.7]
        returned.expect(step, samplers)
        last.sampled[step] = len(samplers)
        for index, state in enumerate(samplers):
            truth[state.id].append(1000 * step + index)
        for state in live:
            if rng.random() < 0.1:
                state.token_ids = list(truth[state.id])
        if rng.random() < 0.1:
            gone = rng.choice(live)
            live.remove(gone)
            live.append(request(f"s{step}", [1, 2]))
            truth[f"s{step}"] = [1, 2]
    returned.settle(40 + depth, [])
    assert last.asked == [step for step, count in last.sampled.items() if count]


def test_a_stage_that_never_looks_keeps_places_and_asks_nobody() -> None:
    returned, state = ReturnedTokens(None, 3), request("a", [5, 6])
    for step in range(5):
        returned.settle(step, [state])
        returned.expect(step, [state])
    assert len(state.token_ids) == 7


def test_another_number_of_tokens_than_samplers_is_an_error() -> None:
    returned, state = ReturnedTokens(lambda step: [1, 2], 3), request("a", [5, 6])
    returned.expect(0, [state])
    with pytest.raises(ValueError, match="argument 2 is longer"):
        returned.settle(1, [state])
