"""The same tokens through vLLM's engine whatever its scheduler does around them.

Six requests of unlike length and unlike parameters (greedy, seeded, penalised, structured, with log-probabilities)
run one at a time in a plain engine. Every other test changes one thing (company, chunks, blocks, cache, preemption,
scheduling), proves by the engine's own figures that it did happen, and asks for the same tokens and log-probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_process import counter, engine, generate, tokens_of
from equality import BOUND
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams
from vllm.outputs import RequestOutput
from vllm.sampling_params import StructuredOutputsParams

from pomarium.worker.model_runner import StepStats

pytestmark = pytest.mark.e2e

LENGTHS = (33, 7, 100, 1, 70, 16)
NEW_TOKENS = 24
BLOCK_SIZE = 16
PLAIN = {"enable_prefix_caching": False, "block_size": BLOCK_SIZE, "max_num_batched_tokens": 2048}
LOGPROB_BOUND = 20 * BOUND
"""Absolute: the bound of the logits, whose largest is 16 (llama) and 20 (gemma3_text) here."""

KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0, "logprobs": 3},
    {"temperature": 0.9, "top_p": 0.95, "seed": 7},
    {"temperature": 1.0, "seed": 8, "prompt_logprobs": 2, "logprobs": 0},
    {"temperature": 1.1, "top_k": 12, "min_p": 0.01, "seed": 9},
    {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 20, "seed": 10},
    {"temperature": 0.9, "seed": 11, "structured_outputs": StructuredOutputsParams(regex="([a-f]{3}-){40}")},
)


def parameters() -> list[SamplingParams]:
    """Fresh ones: vLLM keeps state in structured parameters."""
    return [SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, **kind) for kind in KINDS]


def prompts(seed: int = 5) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(3, 120, length).tolist() for length in LENGTHS]


@dataclass(frozen=True)
class Baseline:
    """A model and what each request answers by itself."""

    model: Path
    outputs: list[RequestOutput]


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def baseline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    model = write_checkpoint(request.param, tmp_path_factory.mktemp("checkpoint") / request.param)
    with engine(model, **PLAIN) as llm:
        outputs = [generate(llm, [prompt], one)[0] for prompt, one in zip(prompts(), parameters(), strict=True)]
    assert len({tuple(tokens_of(output)) for output in outputs}) == len(outputs), "the requests should differ"
    return Baseline(model, outputs)


def listen(llm: LLM) -> list[StepStats]:
    """The figures of every step from now on."""
    steps: list[StepStats] = []
    llm.collective_rpc(lambda worker: worker.subscribe(steps.append))
    return steps


def assert_same(got: Sequence[RequestOutput], want: Sequence[RequestOutput]) -> None:
    for index, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        assert tokens_of(ours) == tokens_of(theirs), f"request {index}"
        assert_close(ours.outputs[0].logprobs, theirs.outputs[0].logprobs)
        assert_close(ours.prompt_logprobs, theirs.prompt_logprobs)


def assert_close(got: Sequence[dict[int, Any] | None] | None, want: Sequence[dict[int, Any] | None] | None) -> None:
    """Log-probabilities, position by position."""
    for ours, theirs in zip(got or (), want or (), strict=True):
        assert (ours or {}).keys() == (theirs or {}).keys()
        for token, entry in (theirs or {}).items():
            assert abs((ours or {})[token].logprob - entry.logprob) < LOGPROB_BOUND


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


def scarce(model: Path) -> dict[str, int]:
    """Blocks for one sequence of 124 tokens, no more. Gemma's two groups of sliding layers take some, too."""
    blocks = 10 if model.name == "llama" else 17
    return {"num_gpu_blocks_override": blocks, "max_model_len": 124, "max_num_batched_tokens": 16}


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
