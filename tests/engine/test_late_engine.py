"""Tokens that stay on the device and are read a step late, under vLLM's own scheduler: nothing changes.

On a GPU a worker does so by itself (worker/model_runner.py, `ahead`); here it is told to, on the CPU.
"""

from typing import Any

import pytest
from engine_process import counter, engine, generate, tokens_of
from invariance import NEW_TOKENS, PLAIN, Baseline, assert_same, baseline_of, parameters, prompts, scarce
from vllm import LLM, SamplingParams

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


def test_answers_are_the_same_alone_in_company_and_with_a_cached_prefix(baseline: Baseline) -> None:
    with engine(baseline.model, **{**PLAIN, "enable_prefix_caching": True, "max_num_batched_tokens": 64}) as llm:
        read_late(llm)
        for _ in range(2):
            assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert late_steps(llm) > NEW_TOKENS
        for index in (1, 4):
            before = late_steps(llm)
            assert_same(generate(llm, [prompts()[index]], parameters()[index]), baseline.outputs[index : index + 1])
            assert late_steps(llm) >= before + NEW_TOKENS - 1


def test_preempted_requests_whose_token_is_unread_go_on_as_they_were(baseline: Baseline) -> None:
    with engine(baseline.model, **{**PLAIN, **scarce(baseline.model)}) as llm:
        read_late(llm)
        for _ in range(2):
            assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert counter(llm, "vllm:num_preemptions") >= 2
        assert late_steps(llm) > NEW_TOKENS


def test_a_request_that_the_host_must_look_at_makes_its_steps_wait_and_no_more(baseline: Baseline) -> None:
    """Processed log-probabilities are told by the host: of a short request beside others that ask for none."""
    asking = SamplingParams(temperature=0, logprobs=2, max_tokens=6, ignore_eos=True)
    params = parameters()[1::2]
    texts, want = prompts()[1::2], baseline.outputs[1::2]
    with engine(baseline.model, **PLAIN, logprobs_mode="processed_logprobs") as llm:
        alone = generate(llm, [prompts()[0]], asking)
        read_late(llm)
        assert_same(generate(llm, [prompts()[0]], asking), alone)
        assert late_steps(llm) == 0
        outputs = generate(llm, [*texts, prompts()[0]], [*params, asking])
        assert late_steps(llm) >= NEW_TOKENS - 6 - 1
    assert_same(outputs, [*want, *alone])


def test_a_stop_that_is_seen_a_step_late_costs_nothing_but_a_row(baseline: Baseline) -> None:
    """Each request stops at a token of its own answer, one after the other; the others go on."""

    def stopping() -> tuple[list[list[int]], list[SamplingParams]]:
        params = parameters()
        for index, (one, output) in enumerate(zip(params, baseline.outputs, strict=True)):
            one.stop_token_ids = [tokens_of(output)[3 + index]]
            one.min_tokens = 0
        return prompts(), params

    with engine(baseline.model, **PLAIN) as llm:
        waited = generate(llm, *stopping())
        read_late(llm)
        late = generate(llm, *stopping())
        assert late_steps(llm) > 0
    assert_same(late, waited)
    assert [len(tokens_of(output)) < NEW_TOKENS for output in late].count(True) >= 4
