"""Steps bound by their seconds in vLLM's engine: a tiny model whose every row is made to take its time.

What is slowed is the forward pass of the worker itself, so that its own figures, which the scheduler goes by, are true.
Asserted are rows of steps: on a busy machine rows take longer, steps get fewer of them, and seconds say nothing.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import pytest
from engine_process import engine, generate, tokens_of
from staged_engine import staged
from tiny_models import write_checkpoint
from vllm import LLM, SamplingParams

from pomarium.cluster.engine.scheduling.bounded import BoundAsyncScheduler, BoundCohortScheduler, BoundScheduler
from pomarium.worker.batch import Batch
from pomarium.worker.forward import PagedForward
from pomarium.worker.model_runner import StepStats
from pomarium.worker.models import embedded
from pomarium.worker.pipeline.forward import StageForward

pytestmark = pytest.mark.e2e

TARGET_S = 0.2
ROW_S = 0.002
"""So that a tiny model's own time does not matter, on a busy machine either: 100 rows take the target."""
ENGINE = {"enable_prefix_caching": False, "max_model_len": 2048, "max_num_batched_tokens": 2048}
BOUND, FREE = {"POMARIUM_STEP_SECONDS": str(TARGET_S)}, {"POMARIUM_STEP_SECONDS": "0"}
LONG = [5 + n % 100 for n in range(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("llama", tmp_path_factory.mktemp("checkpoint"), max_position_embeddings=2048)


@contextmanager
def slowed(kind: Any, per_row_s: float = ROW_S) -> Iterator[None]:
    """Each row of a step takes `per_row_s` more in all forwards of the `kind`."""
    run = kind.run

    def slow(self: Any, batch: Batch, *inputs: Any) -> mx.array:
        output = run(self, batch, *inputs)
        mx.eval(output)
        time.sleep(per_row_s * len(batch.token_ids))
        return output

    with patch.object(kind, "run", slow):
        yield


def figures(llm: LLM) -> list[StepStats]:
    """Of every step from now on, of all stages."""
    steps: list[StepStats] = []
    llm.collective_rpc(lambda worker: worker.subscribe(steps.append))
    return steps


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)


def play(llm: LLM, late: list[list[int]]) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Two requests decode when the prompts `late` arrive; when the tokens of each request came, and which."""
    loop = llm.llm_engine
    times: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}

    def add(name: str, prompt: list[int], count: int) -> None:
        times[name] = []
        loop.add_request(name, {"prompt_token_ids": prompt}, greedy(count))

    for name in ("a", "b"):
        add(name, [7, 8, 9], 60)
    waiting = {f"late {index}": prompt for index, prompt in enumerate(late)}
    while loop.has_unfinished_requests() or waiting:
        if waiting and len(times["a"]) >= 20:
            for name, prompt in waiting.items():
                add(name, prompt, 4)
            waiting = {}
        for output in loop.step():
            known = len(output.outputs[0].token_ids)
            times[output.request_id] += [time.perf_counter()] * (known - len(times[output.request_id]))
            tokens[output.request_id] = list(output.outputs[0].token_ids)
    return times, tokens


def widest(times: list[float]) -> float:
    return max(later - earlier for earlier, later in pairwise(times))


def test_a_long_prompt_leaves_those_beside_it_their_tokens(model: Path) -> None:
    with slowed(PagedForward):
        with engine(model, FREE, **ENGINE) as llm:
            assert not isinstance(llm.llm_engine.engine_core.engine_core.scheduler, BoundScheduler)
            steps = figures(llm)
            _, free = play(llm, [LONG])
            assert max(step.rows for step in steps) > 0.9 * len(LONG)
        with engine(model, BOUND, **ENGINE) as llm:
            assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler, BoundAsyncScheduler)
            generate(llm, [LONG], greedy(1))  # the device is known
            steps = figures(llm)
            _, bound = play(llm, [LONG])
    assert bound == free
    assert max(step.rows for step in steps) < len(LONG) / 3


def test_a_short_prompt_does_not_wait_for_several_long_ones(model: Path) -> None:
    with slowed(PagedForward), engine(model, BOUND, **ENGINE) as llm:
        generate(llm, [LONG], greedy(1))
        steps = figures(llm)
        times, tokens = play(llm, [LONG, LONG[::-1], [*LONG[400:], *LONG[:400]], [9] * 30])
        alone = [tokens_of(generate(llm, [prompt], greedy(4))[0]) for prompt in (LONG, [9] * 30)]
    first = {name: found[0] for name, found in times.items()}
    began = times["a"][19]
    assert first["late 3"] - began < 0.3 * (first["late 2"] - began)
    assert [tokens["late 0"], tokens["late 3"]] == alone
    assert max(step.rows for step in steps) < len(LONG) / 3


def test_the_users_budget_stays_the_upper_bound(model: Path) -> None:
    with slowed(PagedForward, 0.0), engine(model, BOUND, **{**ENGINE, "max_num_batched_tokens": 64}) as llm:
        steps = figures(llm)
        generate(llm, [LONG] * 3, greedy(2))
    assert max(step.rows for step in steps) == 64


def test_a_fast_device_comes_to_whole_steps(model: Path) -> None:
    with engine(model, {"POMARIUM_STEP_SECONDS": "100"}, **{**ENGINE, "max_num_batched_tokens": 512}) as llm:
        for _ in range(3):
            steps = figures(llm)
            generate(llm, [LONG], greedy(1))
    assert [step.rows for step in steps] == [512, 388]


def test_the_slowest_of_the_stages_counts(model: Path) -> None:
    """Only the first of two is slow, which hands on and samples nothing."""
    first_alone = StageForward.run

    def slow(self: StageForward, batch: Batch, inputs: Any) -> mx.array:
        output = first_alone(self, batch, inputs)
        if not self._model.cut.has_head:
            time.sleep(ROW_S * len(batch.token_ids))
        return output

    with patch.object(StageForward, "run", slow):
        with staged(model, [0, 2, 4], FREE, **ENGINE) as (llm, _):
            _, free = play(llm, [LONG])
        with staged(model, [0, 2, 4], BOUND, **ENGINE) as (llm, _):
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            assert isinstance(scheduler, BoundCohortScheduler)
            generate(llm, [LONG], greedy(1))
            _, bound = play(llm, [LONG])
            assert scheduler.step_budget < 500
    assert bound == free


def test_a_worker_that_tells_no_time_is_not_bound(model: Path) -> None:
    arguments = {**ENGINE, "worker_cls": "pomarium.worker.metal_worker.MetalWorker"}
    with engine(model, BOUND, **arguments) as llm:
        generate(llm, [[7, 8]], greedy(1))
        steps = figures(llm)
        generate(llm, [LONG], greedy(1))
    assert [step.rows for step in steps] == [len(LONG)]


@pytest.mark.full
def test_smollm2_beside_a_long_prompt() -> None:
    """Nothing is slowed but what this machine is: its own steps of 2,000 rows against steps of about a second."""
    long = [100 + 31 * n * n % 20_000 for n in range(2000)]
    arguments = {**ENGINE, "max_model_len": 4096, "kv_cache_memory_bytes": 1 << 29}
    gaps, tokens = [], []
    for environment in (FREE, {"POMARIUM_STEP_SECONDS": "1"}):
        with engine(embedded.path(), environment, **arguments) as llm:
            generate(llm, [long[:600]], greedy(1))
            times, found = play(llm, [long])
        gaps.append(widest(times["a"]))
        tokens.append(found)
    assert tokens[1] == tokens[0]
    assert gaps[1] < max(gaps[0] / 2, 1.5)
