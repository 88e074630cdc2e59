"""The same tokens and log-probabilities from two, three and one-layer stages as from one machine, whatever the engine's
scheduler does around them: chunks, cached prefixes, preemption, structured output, async scheduling on and off.

The engine and its workers are real but for their processes (staged_engine.py).
"""

from pathlib import Path

import pytest
from engine_process import counter, engine, generate, tokens_of
from invariance import LENGTHS, PLAIN, Baseline, assert_same, baseline_of, parameters, prompts, scarce
from staged_engine import StageThread, staged
from tiny_models import TINY
from vllm import SamplingParams

from pomarium.worker.model_runner import StepStats

pytestmark = pytest.mark.e2e

FULL = pytest.mark.full
CUTS = ("two", pytest.param("three", marks=FULL), "one layer each")


@pytest.fixture(scope="module", params=["llama", "gemma3_text", pytest.param("qwen3_moe", marks=FULL)])
def baseline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    return baseline_of(request.param, tmp_path_factory.mktemp("checkpoint"))


def bounds(model: Path, cut: str) -> list[int]:
    layers = TINY[model.name]["num_hidden_layers"]
    if cut == "two":
        return [0, layers // 2 + 1, layers]
    return [0, 1, layers - 1, layers] if cut == "three" else list(range(layers + 1))


def listen(stages: list[StageThread]) -> list[list[StepStats]]:
    """The figures of every step from now on, by stage."""
    steps: list[list[StepStats]] = [[] for _ in stages]
    for stage, own in zip(stages, steps, strict=True):
        stage.host.worker.subscribe(own.append)
    return steps


@pytest.mark.parametrize("cut", ["two", "three", "one layer each"])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_stages_change_nothing(baseline: Baseline, cut: str, asynchronous: bool) -> None:
    with staged(baseline.model, bounds(baseline.model, cut), **PLAIN, async_scheduling=asynchronous) as (llm, stages):
        steps = listen(stages)
        assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert_same(generate(llm, prompts()[::-1], parameters()[::-1])[::-1], baseline.outputs)
    assert all(len(own) == len(steps[0]) for own in steps)
    assert sum(step.rows for step in steps[0]) == sum(step.rows for step in steps[-1])


@pytest.mark.parametrize("cut", CUTS)
def test_chunks_and_cached_prefixes_change_nothing(baseline: Baseline, cut: str) -> None:
    arguments = {**PLAIN, "enable_prefix_caching": True, "max_num_batched_tokens": 16}
    with staged(baseline.model, bounds(baseline.model, cut), **arguments) as (llm, _):
        for _ in range(2):
            assert_same(generate(llm, prompts(), parameters()), baseline.outputs)
        assert counter(llm, "vllm:prefix_cache_hits") >= 96


@pytest.mark.parametrize("cut", ["two", *(pytest.param(cut, marks=FULL) for cut in ("three", "one layer each"))])
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("prefix_caching", [True, False])
def test_preemption_changes_nothing(baseline: Baseline, cut: str, prefix_caching: bool, asynchronous: bool) -> None:
    arguments = {
        **PLAIN,
        "enable_prefix_caching": prefix_caching,
        "async_scheduling": asynchronous,
        **scarce(baseline.model),
    }
    times = 2
    if baseline.model.name == "gemma3_text":
        # vLLM wants a sequence to fit in what the smallest stage makes of the blocks; more requests then fill them.
        arguments["num_gpu_blocks_override"] = {"two": 21, "three": 21, "one layer each": 27}[cut]
        times = 3
    with staged(baseline.model, bounds(baseline.model, cut), **arguments) as (llm, _):
        params = [one for _ in range(times) for one in parameters()]
        assert_same(generate(llm, prompts() * times, params), baseline.outputs * times)
        assert counter(llm, "vllm:num_preemptions") >= 2


def test_several_answers_to_one_prompt(baseline: Baseline) -> None:
    """n > 1 with a seed: the answers differ, and are those of one machine."""
    params = SamplingParams(n=3, seed=5, temperature=1.0, max_tokens=12, ignore_eos=True)
    with engine(baseline.model, **PLAIN) as llm:
        (want,) = generate(llm, [prompts()[0]], params)
    with staged(baseline.model, bounds(baseline.model, "three"), **PLAIN) as (llm, _):
        (got,) = generate(llm, [prompts()[0]], params)
    assert len({tuple(answer.token_ids) for answer in want.outputs}) == 3
    assert [answer.token_ids for answer in got.outputs] == [answer.token_ids for answer in want.outputs]


def test_an_aborted_request_leaves_the_others_alone(baseline: Baseline) -> None:
    with staged(baseline.model, bounds(baseline.model, "two"), **PLAIN) as (llm, _):
        core = llm.llm_engine
        for index, (prompt, one) in enumerate(zip(prompts(), parameters(), strict=True)):
            core.add_request(str(index), {"prompt_token_ids": prompt}, one)
        done = {}
        for step in range(400):
            if step == 9:
                core.abort_request(["3"])
            done |= {output.request_id: output for output in core.step() if output.finished}
            if not core.has_unfinished_requests():
                break
    kept = [index for index in range(len(LENGTHS)) if index != 3]
    assert_same([done[str(index)] for index in kept], [baseline.outputs[index] for index in kept])
    assert all(tokens_of(done[str(index)]) for index in kept)
