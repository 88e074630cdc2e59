"""Tokens that stay on the device and are read a step late, under vLLM's own scheduler: nothing changes.

On a GPU a worker does so by itself (worker/model_runner.py, `ahead`); here it is told to, on the CPU.
"""

from collections.abc import Sequence
from typing import Any

import pytest
from engine_process import counter, engine, generate, tokens_of
from invariance import NEW_TOKENS, PLAIN, Baseline, assert_same, baseline_of, parameters, prompts, scarce
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return baseline_of("llama", tmp_path_factory.mktemp("checkpoint"))


def read_late(llm: LLM) -> None:
    """From now on; counts the steps that were."""

    def switch(worker: Any) -> None:
        runner, queue, worker.late_steps = worker.runner, worker.runner._queue, 0

        def counted(*arguments: Any) -> Any:
            worker.late_steps += 1
            return queue(*arguments)

        runner._ahead, runner._queue = True, counted

    llm.collective_rpc(switch)


def late_steps(llm: LLM) -> int:
    (count,) = llm.collective_rpc(lambda worker: worker.late_steps)
    return int(count)


DRAWN = (0, 1, 2, 3, 5)
"""Of the six requests those whose next token does not hang on which tokens they have."""


def drawn() -> tuple[list[list[int]], list[SamplingParams]]:
    """These requests, without log-probabilities: the device draws for them."""
    params = [parameters()[index] for index in DRAWN]
    for one in params:
        one.logprobs = one.prompt_logprobs = None
    return [prompts()[index] for index in DRAWN], params


def answers(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [list(tokens_of(output)) for output in outputs]


def wanted(baseline: Baseline) -> list[list[int]]:
    return answers([baseline.outputs[index] for index in DRAWN])


def test_tokens_are_the_same_alone_in_company_and_with_a_cached_prefix(baseline: Baseline) -> None:
    want = wanted(baseline)
    with engine(baseline.model, **{**PLAIN, "enable_prefix_caching": True, "max_num_batched_tokens": 64}) as llm:
        read_late(llm)
        for _ in range(2):
            assert answers(generate(llm, *drawn())) == want
        assert late_steps(llm) > NEW_TOKENS
        before = late_steps(llm)
        texts, params = drawn()
        assert answers(generate(llm, texts[1:2], params[1:2])) == want[1:2]
        assert late_steps(llm) >= before + NEW_TOKENS - 1


def test_preempted_requests_whose_token_is_unread_go_on_as_they_were(baseline: Baseline) -> None:
    with engine(baseline.model, **{**PLAIN, **scarce(baseline.model)}) as llm:
        read_late(llm)
        for _ in range(2):
            assert answers(generate(llm, *drawn())) == wanted(baseline)
        assert counter(llm, "vllm:num_preemptions") >= 2
        assert late_steps(llm) > NEW_TOKENS


def test_a_request_that_the_host_must_look_at_makes_its_steps_wait_and_no_more(baseline: Baseline) -> None:
    """Log-probabilities and penalties, and then a short penalised request beside the others."""
    texts, params = drawn()
    penalised = SamplingParams(temperature=0, repetition_penalty=1.3, max_tokens=6, ignore_eos=True)
    with engine(baseline.model, **PLAIN) as llm:
        (alone,) = generate(llm, [prompts()[4]], penalised)
        read_late(llm)
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert late_steps(llm) == 0
        outputs = generate(llm, [*texts, prompts()[4]], [*params, penalised])
        assert late_steps(llm) >= NEW_TOKENS - 6 - 1
    assert answers(outputs) == [*wanted(baseline), list(tokens_of(alone))]


def test_a_stop_that_is_seen_a_step_late_costs_nothing_but_a_row(baseline: Baseline) -> None:
    """Each request stops at a token of its own answer, one after the other; the others go on."""
    want = wanted(baseline)

    def stopping() -> tuple[list[list[int]], list[SamplingParams]]:
        texts, params = drawn()
        for index, (one, answer) in enumerate(zip(params, want, strict=True)):
            one.stop_token_ids = [answer[3 + index]]
        return texts, params

    with engine(baseline.model, **PLAIN) as llm:
        waited = answers(generate(llm, *stopping()))
        read_late(llm)
        late = answers(generate(llm, *stopping()))
        assert late_steps(llm) > 0
    assert late == waited
    assert [len(answer) < NEW_TOKENS for answer in late].count(True) >= 4
