"""The same tokens through vLLM's engine whatever its scheduler does around them.

Six requests run one at a time in a plain engine (invariance.py). Every other test changes one thing (company, chunks,
blocks, cache, preemption, scheduling), proves by the engine's own figures that it did happen, and asks for the same
tokens and log-probabilities.
"""

import pytest
from engine_process import counter, engine, generate, tokens_of
from invariance import (
    BLOCK_SIZE,
    KINDS,
    LENGTHS,
    NEW_TOKENS,
    PLAIN,
    Baseline,
    assert_same,
    baseline_of,
    parameters,
    prompts,
    scarce,
)
from vllm import LLM, SamplingParams

from pomarium.worker.model_runner import StepStats

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def baseline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return baseline_of(request.param, tmp_path_factory.mktemp("checkpoint"))


def listen(llm: LLM) -> list[StepStats]:
    """The figures of every step from now on."""
    steps: list[StepStats] = []
    llm.collective_rpc(lambda worker: worker.subscribe(steps.append))
    return steps


def test_company_changes_nothing(baseline: Baseline) -> None:
    with engine(baseline.model, **PLAIN) as llm:
        steps = listen(llm)
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert max(step.sampled for step in steps) == len(LENGTHS)
        reverse = generate(llm, prompts()[::-1], parameters()[::-1])
    assert_same(reverse[::-1], baseline.outputs)


@pytest.mark.parametrize("budget", [16, 64])
def test_prompt_chunks_change_nothing(baseline: Baseline, budget: int) -> None:
    with engine(baseline.model, **{**PLAIN, "max_num_batched_tokens": budget}) as llm:
        steps = listen(llm)
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
    assert max(step.rows for step in steps) == budget
    mixed = [step for step in steps if step.rows > step.requests and step.sampled]
    assert mixed, "no step carried a chunk of a prompt beside a running request"


@pytest.mark.parametrize("block_size", [8, 32])
def test_block_size_changes_nothing(baseline: Baseline, block_size: int) -> None:
    with engine(baseline.model, **{**PLAIN, "block_size": block_size}) as llm:
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)


@pytest.mark.parametrize("budget", [16, 2048])
def test_cached_prefix_changes_nothing(baseline: Baseline, budget: int) -> None:
    arguments = {**PLAIN, "enable_prefix_caching": True, "max_num_batched_tokens": budget}
    with engine(baseline.model, **arguments) as llm:
        cold = generate(llm, prompts(), parameters())
        hit = generate(llm, prompts(), parameters())
        hits = counter(llm, "vllm:prefix_cache_hits")
    assert_same(cold, baseline.outputs)
    assert_same(hit, baseline.outputs)
    assert sum(output.num_cached_tokens or 0 for output in cold) == 0
    # vLLM recomputes the last token and reads no cache for a request with prompt_logprobs.
    cached = [output.num_cached_tokens for output in hit]
    expected = [(length - 1) // BLOCK_SIZE * BLOCK_SIZE for length in LENGTHS]
    expected[2] = 0
    assert cached == expected
    assert hits == sum(expected)


def test_prefix_shared_by_running_requests_changes_nothing(baseline: Baseline) -> None:
    """Requests that extend the first one's answer read the blocks that it filled while it generated."""
    first = baseline.outputs[0]
    longer = [*(first.prompt_token_ids or ()), *tokens_of(first)[:20]]
    rest = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    with engine(baseline.model, **{**PLAIN, "enable_prefix_caching": True}) as llm:
        generate(llm, [prompts()[0]], parameters()[0])
        outputs = generate(llm, [longer, longer], rest)
    # Of sliding layers vLLM keeps the blocks at the end of the prompt, not those filled later.
    assert outputs[0].num_cached_tokens == (48 if baseline.model.name == "llama" else 32)
    assert [tokens_of(output) for output in outputs] == [tokens_of(first)[20:]] * 2


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_nothing(baseline: Baseline, prefix_caching: bool, asynchronous: bool) -> None:
    arguments = {
        **PLAIN,
        "enable_prefix_caching": prefix_caching,
        "async_scheduling": asynchronous,
        **scarce(baseline.model),
    }
    with engine(baseline.model, **arguments) as llm:
        for _ in range(2):
            assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        preemptions = counter(llm, "vllm:num_preemptions")
    print(f"{baseline.model.name}: {preemptions} preemptions")
    assert preemptions >= 2


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_prompt_logprobs_come_once_though_preempted_later(baseline: Baseline, prefix_caching: bool) -> None:
    """The last request is the one vLLM preempts, here after its prompt was through; it computes the prompt again."""
    if baseline.model.name != "llama":
        pytest.skip("these three requests fit into the smallest pool that Gemma's layers allow")
    order, params = [4, 0, 2], parameters()
    arguments = {
        **PLAIN,
        "enable_prefix_caching": prefix_caching,
        **scarce(baseline.model),
    }
    with engine(baseline.model, **arguments) as llm:
        steps = listen(llm)
        got = generate(llm, [prompts()[index] for index in order], [params[index] for index in order])
        assert counter(llm, "vllm:num_preemptions") > 0
    assert sum(step.rows for step in steps) > sum(LENGTHS[index] + NEW_TOKENS - 1 for index in order), "none recomputed"
    assert len(got[-1].prompt_logprobs or ()) == LENGTHS[2]
    assert_same(got, [baseline.outputs[index] for index in order])


def test_async_scheduling_is_on_by_default_and_changes_nothing(baseline: Baseline) -> None:
    with engine(baseline.model) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is True
        assert llm.llm_engine.engine_core.engine_core.batch_queue is not None
    with engine(baseline.model, **PLAIN, async_scheduling=False) as llm:
        assert llm.llm_engine.engine_core.engine_core.batch_queue is None
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)


@pytest.mark.parametrize("budget", [16, 2048])
def test_contiguous_cache_changes_nothing(baseline: Baseline, budget: int) -> None:
    arguments = {**PLAIN, "max_num_batched_tokens": budget}
    with engine(baseline.model, {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}, **arguments) as llm:
        assert llm.collective_rpc(lambda worker: worker.paged is None) == [True]
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)


def test_seeds_matter(baseline: Baseline) -> None:
    """Else equal tokens of seeded requests would prove nothing."""
    other = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **{**KINDS[1], "seed": 12})
    with engine(baseline.model, **PLAIN) as llm:
        assert tokens_of(generate(llm, [prompts()[1]], other)[0]) != tokens_of(baseline.outputs[1])
