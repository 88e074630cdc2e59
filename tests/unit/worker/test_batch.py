"""Requests and their rows: what the scheduler sends becomes rows, samplers and wanted logits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.batch import build_batch
from pomarium.worker.requests import RequestTable
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, NewRequest, Step

GREEDY = SamplingParams(temperature=0.0)
SCORED = SamplingParams(temperature=0.0, num_prompt_logprobs=2)


def new(name: str, length: int, computed: int = 0, sampling: SamplingParams = GREEDY) -> NewRequest:
    return NewRequest(name, tuple(range(length)), length, computed, ((1, 2),), sampling)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30), st.booleans()), min_size=1, max_size=6))
def test_rows_samplers_and_wanted_logits(requests: list[tuple[int, int, bool]]) -> None:
    """Each request brings (prompt length, chunk, whether it wants its prompt scored)."""
    table = RequestTable(1000)
    chunks = {str(index): min(length, chunk) for index, (length, chunk, _) in enumerate(requests)}
    step = Step(
        chunks,
        tuple(
            new(str(index), length, sampling=SCORED if scored else GREEDY)
            for index, (length, _, scored) in enumerate(requests)
        ),
    )
    batch = build_batch(table.apply(step))
    assert len(batch.token_ids) == sum(chunks.values())
    assert batch.samplers == tuple(name for name, count in chunks.items() if count == requests[int(name)][0])
    assert sorted(set(batch.logit_rows.tolist())) == batch.logit_rows.tolist()
    first = 0
    for name, count in chunks.items():
        length, _, scored = requests[int(name)]
        assert batch.positions[first : first + count].tolist() == list(range(count))
        if name in batch.samplers:
            place = batch.samplers.index(name)
            assert batch.logit_rows[batch.sample_index[place]] == first + count - 1
        if scored and length > 1:
            low, high = batch.prompt_index[name]
            assert batch.logit_rows[low:high].tolist() == list(range(first, first + min(count, length - 1)))
        else:
            assert name not in batch.prompt_index
        first += count


def test_a_resumed_request_starts_over_with_the_scheduler_s_tokens() -> None:
    table = RequestTable(1000)
    table.apply(Step({"a": 3}, (new("a", 3),)))
    table["a"].token_ids.append(99)  # sampled ahead of the scheduler, which then preempted the request
    resumed = CachedRequest("a", 0, ((5, 6),), resumed=True, token_ids=(0, 1, 2))
    ((state, count),) = table.apply(Step({"a": 3}, cached=(resumed,)))
    assert (state.token_ids, state.block_tables, state.num_computed_tokens, count) == ([0, 1, 2], [[5, 6]], 0, 3)


def test_blocks_are_appended_and_finished_requests_forgotten() -> None:
    table = RequestTable(1000)
    table.apply(Step({"a": 3, "b": 3}, (new("a", 3), new("b", 3))))
    table.apply(Step({"a": 1}, cached=(CachedRequest("a", 3, ((7,),)),), finished=frozenset({"b", "never sent"})))
    assert table["a"].block_tables == [[1, 2, 7]]
    assert "b" not in table
    assert len(table) == 1


def test_an_unknown_request_is_an_error() -> None:
    with pytest.raises(KeyError):
        RequestTable(1000).apply(Step({"x": 1}, cached=(CachedRequest("x", 0, None),)))
