"""What travels to workers: a step is pickled whatever a client nested, and the scheduler's own request stays whole."""

import pickle
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

from pomarium.cluster.executor.codec import decode, encode_call
from pomarium.cluster.executor.parcel import for_workers


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def step(*params: SamplingParams) -> SchedulerOutput:
    new = [NewRequestData(f"r{i}", [1, 2], [], p, None, ([0],), 0, None) for i, p in enumerate(params)]
    output = SchedulerOutput.make_empty()
    output.scheduled_new_reqs = new
    return output


def test_a_form_stays_in_the_engine() -> None:
    form = StructuredOutputsParams(json=nested(1_000))
    constrained, plain = SamplingParams(temperature=0.5, structured_outputs=form), SamplingParams(seed=3)
    output = step(constrained, plain)
    with pytest.raises(RecursionError):
        pickle.dumps(output)
    _, (sent,), _ = decode(encode_call("execute_model", (for_workers(output),)))
    first, second = (new.sampling_params for new in sent.scheduled_new_reqs)
    assert (first.structured_outputs, first.temperature, second.seed) == (None, 0.5, 3)
    assert output.scheduled_new_reqs[0].sampling_params is constrained
    assert constrained.structured_outputs is form


def test_a_step_without_forms_is_sent_as_it_is() -> None:
    output = step(SamplingParams(), SamplingParams(n=2))
    assert for_workers(output) is output
