"""The cohort scheduler in vLLM's engine over virtual stages (benchmarks/virtual_stages.py): exact times, true tokens.

Every play is checked for the invariant of cluster/engine/scheduling/scheduler.py, and its tokens against those of one
stage under vLLM's own scheduler, which is given neither preemption nor a prefix cache nor limits.
"""

import json
import pickle
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY, write_tokenizer
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from pomarium.cluster.engine.scheduling.install import StagedConfig
from pomarium.cluster.engine.scheduling.resumed import ResumingAsyncScheduler, ResumingScheduler
from pomarium.cluster.engine.scheduling.scheduler import CohortScheduler, SyncCohortScheduler
from pomarium.cluster.engine.scheduling.share import Measured, cohorts, even, round_ms

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from virtual_stages import Arrival, Costs, Pipeline, Played, engine, plain

CONSTANT, GROWING = Costs(20, 0), Costs(12, 1)
TOKENS = 60

Make = Callable[..., Pipeline]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Make]:
    """Engines, each made once: they take about a second."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "config.json").write_text(json.dumps(TINY["llama"] | {"max_position_embeddings": 2048}))
    write_tokenizer(folder)
    made: dict[str, Pipeline] = {}
    with ExitStack() as stack:

        def pipeline(stages: int, scheduler: type | None = None, **arguments: Any) -> Pipeline:
            key = repr((stages, scheduler, sorted(arguments.items())))
            if key not in made:
                made[key] = stack.enter_context(
                    engine(stages, scheduler, folder, skip_tokenizer_init=False, **arguments)
                )
            return made[key]

        yield pipeline


def streams(count: int, gap_ms: float = 0.0, tokens: int = TOKENS) -> list[Arrival]:
    return [Arrival([7 + index] * 4, plain(tokens), index * gap_ms) for index in range(count)]


def play(pipeline: Pipeline, arrivals: Sequence[Arrival], costs: Costs = CONSTANT) -> Played:
    """Plays, and checks every step."""
    stages = pipeline.executor.stages
    played = pipeline.play(arrivals, costs)
    most = pipeline.llm.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
    for step in played.steps:
        assert sum(step.tokens.values()) <= most
        for request_id, (count, latest) in step.unseen.items():
            assert count == 1, "more than two tokens in flight"
            assert step.number - latest >= stages
            assert request_id not in step.resumed, "resumed before all of its tokens are known"
    return played


def assert_same(ours: Played, theirs: Played) -> None:
    for index, (got, want) in enumerate(zip(ours.tokens, theirs.tokens, strict=True)):
        assert got == want, f"request {index}"
    assert ours.reasons == theirs.reasons


def bound(stages: int, count: int, costs: Costs) -> float:
    """Least idle share with all of `count` requests in each round: the largest cohort's tokens have to come round."""
    busy = [costs.step_ms(size) for size in even(count, stages)]
    return 1 - sum(busy) / (stages * (busy[0] + costs.link_ms))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_stages_are_busy(make: Make, stages: int) -> None:
    for count, gap in ((4, 0), (4, 70), (16, 0), (16, 70)):
        for costs in (CONSTANT, GROWING):
            played = play(make(stages), streams(count, gap), costs)
            assert_same(played, play(make(1), streams(count, gap), costs))
            assert len(played.steps[-1].starts) == stages
            least = bound(stages, count, costs)
            assert least <= 0.05 or count % stages
            for idle in played.idle(played.window(100)):
                assert idle == pytest.approx(least, abs=0.004)


@pytest.mark.parametrize(("stages", "gain"), [(2, 1.35), (4, 1.6)])
def test_throughput_beside_vllms_own_scheduler(make: Make, stages: int, gain: float) -> None:
    for gap in (0, 30):
        ours = play(make(stages), streams(16, gap), GROWING)
        stock = make(stages, AsyncScheduler).play(streams(16, gap), GROWING)
        assert ours.rate(ours.window(100)) > gain * stock.rate(stock.window(100))


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("link", [0.0, 0.3, 1.0])
def test_a_single_stream_is_as_fast_as_it_can_be(make: Make, stages: int, link: float) -> None:
    """No worse than vLLM's own, and each token one passage of the stages after the one before."""
    costs = Costs(12, 1, link)
    ours = play(make(stages), streams(1), costs)
    stock = make(stages, AsyncScheduler).play(streams(1), costs)
    gaps = [later - earlier for earlier, later in pairwise(ours.times[0][1:])]
    assert gaps == pytest.approx([stages * (13 + link)] * len(gaps))
    assert ours.times[0][0] <= stock.times[0][0] + 1e-6
    assert ours.times[0][-1] <= stock.times[0][-1] + 1e-6


@pytest.mark.parametrize("stages", [2, 4])
def test_a_long_prompt_passes_the_stages_in_pieces(make: Make, stages: int) -> None:
    """It is answered in less than two thirds of the time, while the others' worst gap is far shorter."""
    arrivals = [*streams(stages, tokens=150), Arrival(list(range(3, 103)) * 15, plain(20), 500.0)]
    ours = play(make(stages), arrivals, GROWING)
    stock = make(stages, AsyncScheduler).play(arrivals, GROWING)
    assert_same(ours, play(make(1), arrivals, GROWING))
    first = [played.times[-1][0] - 500 for played in (ours, stock)]
    worst = [max(b - a for own in played.times[:-1] for a, b in pairwise(own)) for played in (ours, stock)]
    assert first[0] < 0.8 * first[1] if stages == 2 else first[0] < 0.6 * first[1]
    assert worst[0] < 0.7 * worst[1]
    sizes = [step.tokens[name] for step in ours.steps for name in step.tokens if step.tokens[name] > 4]
    assert len(sizes) >= stages
    assert max(sizes) <= -(-1500 // stages)


class OneMoreCohort(CohortScheduler):
    """S + 1 cohorts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cohorts += 1


@pytest.mark.parametrize(("count", "link", "better"), [(16, 0.3, 4), (16, 6.0, 4), (64, 6.0, 5)])
def test_the_number_of_numberfollows_from_what_is_measured(make: Make, count: int, link: float, better: int) -> None:
    costs = Costs(12, 1, link)
    measured = Measured(count, costs.step_ms, link, costs.engine_ms)
    rates = {}
    for number, scheduler in ((4, None), (5, OneMoreCohort)):
        played = play(make(4, scheduler), streams(count, tokens=30), costs)
        rates[number] = played.rate(played.window(100))
        assert rates[number] == pytest.approx(1000 * count / round_ms(4, number, measured), rel=0.01)
    assert max(rates, key=lambda own: rates[own]) == cohorts(4, measured) == better


def test_async_off_waits_for_each_token(make: Make) -> None:
    """S cohorts all the same; what is lost is the way to the scheduler and back, and its own time."""
    pipeline = make(3, async_scheduling=False)
    assert type(pipeline.core.scheduler) is SyncCohortScheduler
    assert pipeline.core.batch_queue_size == 3
    played = play(pipeline, streams(15, 20))
    assert_same(played, play(make(1), streams(15, 20)))
    assert not any(step.unseen for step in played.steps)
    assert max(played.idle(played.window(100))) < 0.06


def scarce(count: int) -> list[Arrival]:
    """Requests that grow to 100 tokens each."""
    return [Arrival([5 + index] * (10 + index), plain(90 - index), 15.0 * index) for index in range(count)]


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_preempted_requests_answer_the_same(make: Make, stages: int, asynchronous: bool) -> None:
    pipeline = make(stages, num_gpu_blocks_override=16, max_model_len=124, async_scheduling=asynchronous)
    played = play(pipeline, scarce(8))
    assert_same(played, play(make(1), scarce(8)))
    assert sum(len(step.resumed) for step in played.steps) >= 4


def structured(tokens: int = 24) -> list[Arrival]:
    """Three with a grammar, three without."""
    arrivals = []
    for index in range(6):
        grammar = {"structured_outputs": StructuredOutputsParams(regex="([a-f]{3}-){40}")} if index % 2 else {}
        params = plain(tokens, detokenize=True, output_kind=RequestOutputKind.CUMULATIVE, **grammar)
        arrivals.append(Arrival([9 + index] * (5 + 30 * index), params, 25.0 * index))
    return arrivals


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_a_grammar_sees_every_token_before_the_next(make: Make, stages: int, asynchronous: bool) -> None:
    for changes in ({}, {"num_gpu_blocks_override": 26, "max_model_len": 300}):
        pipeline = make(stages, async_scheduling=asynchronous, **changes)
        played = play(pipeline, structured(), GROWING)
        assert_same(played, play(make(1), structured(), GROWING))
        assert played.reasons == ["length"] * 6
        assert any(step.resumed for step in played.steps) == bool(changes)


def test_cached_prefixes_are_used_and_change_nothing(make: Make) -> None:
    prefix = list(range(3, 83)) * 2
    arrivals = [Arrival([*prefix, 3 + index], plain(20), 10.0 * index) for index in range(8)]
    played = play(make(3, enable_prefix_caching=True), arrivals, GROWING)
    assert_same(played, play(make(1), arrivals, GROWING))
    assert sum(sum(step.tokens.values()) for step in played.steps) < 161 + 7 * 33 + 8 * 20


def test_limits_of_the_engine_hold(make: Make) -> None:
    changes = {"max_num_seqs": 5, "max_num_batched_tokens": 64, "long_prefill_token_threshold": 48}
    arrivals = [Arrival([5 + index] * (30 * index + 1), plain(20 + index), 5.0 * index) for index in range(12)]
    played = play(make(3, **changes), arrivals, GROWING)
    assert_same(played, play(make(1), arrivals, GROWING))
    assert max(max(step.tokens.values()) for step in played.steps) <= 48
    spans: dict[str, list[int]] = {}
    for step in played.steps:
        for request_id in step.tokens:
            spans.setdefault(request_id, [step.number, 0])[1] = step.number
    for step in played.steps:
        assert sum(first <= step.number <= last for first, last in spans.values()) <= 5


def test_unchunked_prompts_stay_whole(make: Make) -> None:
    arrivals = [Arrival([5] * 900, plain(10)), Arrival([6] * 20, plain(10))]
    played = play(make(2, enable_chunked_prefill=False), arrivals)
    assert_same(played, play(make(1), arrivals))
    assert max(max(step.tokens.values()) for step in played.steps) == 900


def test_priorities_decide_who_is_admitted_and_preempted(make: Make) -> None:
    urgency = (5, 5, 5, 5, 3, 1, 4, 2)
    arrivals = [
        Arrival([5 + index] * 20, plain(30 + 5 * index), 300.0 * (index > 3), priority=urgent)
        for index, urgent in enumerate(urgency)
    ]
    changes = {"scheduling_policy": "priority", "max_num_seqs": 4}
    for stages in (1, 3):
        played = play(make(stages, **changes), arrivals, GROWING)
        assert_same(played, play(make(1), arrivals, GROWING))
        started = sorted(range(4, 8), key=lambda index: played.times[index][0])
        assert [urgency[index] for index in started] == [1, 2, 3, 4]
    few = {"scheduling_policy": "priority", "num_gpu_blocks_override": 12, "max_model_len": 100}
    played = play(make(3, **few), arrivals, GROWING)
    assert_same(played, play(make(1), arrivals, GROWING))
    resumed = {int(name.split("-")[1]) for step in played.steps for name in step.resumed}
    assert resumed
    assert not resumed & {5, 7}, "the two most urgent ones"


def test_aborted_requests_leave_no_hole(make: Make) -> None:
    arrivals = [
        Arrival([5 + index] * 9, plain(60), 10.0 * index, abort_ms=300.0 + 40 * index if index % 3 == 0 else None)
        for index in range(12)
    ]
    played, alone = play(make(3), arrivals), play(make(1), streams(0) + arrivals)
    for index in range(12):
        if index % 3:
            assert played.tokens[index] == alone.tokens[index]
            assert played.reasons[index] == "length"
        else:
            shorter, longer = sorted((played.tokens[index][0], alone.tokens[index][0]), key=len)
            assert longer[: len(shorter)] == shorter
            assert len(shorter) < 60
    last = [time for index in range(12) if index % 3 for time in played.times[index]]
    assert max(played.idle((600.0, max(last) - 250))) < 0.1


def test_several_completions_of_one_prompt(make: Make) -> None:
    params = [plain(25, n=3, seed=4 + index, temperature=0.5) for index in range(3)]
    arrivals = [Arrival([5 + index] * 40, own) for index, own in enumerate(params)]
    played = play(make(3, enable_prefix_caching=True), arrivals)
    assert_same(played, play(make(1), arrivals))
    assert all(len({tuple(tokens) for tokens in own}) == 3 for own in played.tokens)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes(make: Make, seed: int) -> None:
    """Prompts long and short, stop tokens, grammars, aborts, few blocks, shared prefixes, small steps."""
    changes = {
        "num_gpu_blocks_override": 40,
        "max_model_len": 400,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 7,
        "enable_prefix_caching": True,
    }
    rng = random.Random(seed)
    arrivals = [_some(rng) for _ in range(20)]
    alone = play(make(1), arrivals, GROWING)
    for stages in (2, 3, 4):
        for asynchronous in (True, False):
            played = play(make(stages, async_scheduling=asynchronous, **changes), arrivals, GROWING)
            for index, arrival in enumerate(arrivals):
                if arrival.abort_ms is None:
                    assert played.tokens[index] == alone.tokens[index], f"request {index}"
                    assert played.reasons[index] == alone.reasons[index]


def _some(rng: random.Random) -> Arrival:
    changes: dict[str, Any] = {"output_kind": RequestOutputKind.CUMULATIVE}
    if rng.random() < 0.3:
        changes |= {"structured_outputs": StructuredOutputsParams(regex="([a-f]{3}-){40}"), "detokenize": True}
    elif rng.random() < 0.3:
        changes |= {"stop_token_ids": list(range(50, 60))}
    prompt = [rng.randint(3, 5)] * 32 + [rng.randint(3, 120) for _ in range(rng.choice([1, 10, 40, 200]))]
    params: SamplingParams = plain(rng.randint(1, 100), **changes)
    return Arrival(prompt, params, rng.uniform(0, 2000), abort_ms=rng.uniform(0, 2000) if rng.random() < 0.15 else None)


def test_one_stage_has_vllm_s_scheduler_which_resumes_requests(make: Make) -> None:
    assert type(make(1).core.scheduler) is ResumingAsyncScheduler
    assert type(make(1, async_scheduling=False).core.scheduler) is ResumingScheduler
    assert make(1).core.batch_queue_size == 2


def test_the_deeper_queue_travels_with_the_configuration(make: Make) -> None:
    config = make(3).llm.llm_engine.vllm_config
    assert type(make(3).core.scheduler) is CohortScheduler
    assert make(3).core.batch_queue_size == 4
    copied = pickle.loads(pickle.dumps(config))
    assert type(copied) is StagedConfig
    assert copied.max_concurrent_batches == 4
    assert copied.max_in_flight_tokens == 4 * 2048


def test_a_scheduler_that_the_user_names_stays(make: Make) -> None:
    assert type(make(2, AsyncScheduler).core.scheduler) is AsyncScheduler
    assert make(2, AsyncScheduler).core.batch_queue_size == 2
