"""vLLM's engine over pipeline stages on a virtual clock: what a scheduler does to them, exactly.

    engine(stages, ...) --> Pipeline.play(arrivals) --> Played: steps, tokens, times
    EngineCore --execute_model, sample_tokens--> VirtualExecutor: the clock jumps when the engine waits for a result

A step of T tokens takes fixed_ms + token_ms x T on each stage, link_ms from stage to stage and between engine and
stages, engine_ms to schedule. Steps run in order on each stage; the first waits until the last has sent it the tokens
that a step needs, and the last does not sample before the engine says so.

There is no model, but a KV cache: each cached position holds a hash of the one before it, found through the request's
block table, and of its own token. The sampled token is a function of the last hash, so that a token that is wrong, lost
or doubled, or a block that is overwritten, changes all that follow.
"""

import gc
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import vllm.envs
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes

from pomarium.worker.requests import RequestState, RequestTable
from pomarium.worker.vllm_translation import grammar_of, step_of

VOCAB_SIZE, FIRST_TOKEN = 128, 3
MODEL_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "float32",
}


@dataclass(frozen=True)
class Costs:
    """Milliseconds; see the module."""

    fixed_ms: float = 20.0
    token_ms: float = 0.0
    link_ms: float = 0.3
    engine_ms: float = 1.0

    def step_ms(self, tokens: int) -> float:
        """Of one stage."""
        return self.fixed_ms + self.token_ms * tokens


@dataclass
class Step:
    """One step that had tokens.

    Attributes:
        number: of calls of schedule() before it, those that found nothing to do included.
        tokens: request id -> how many it computed. sampled: those that got a token of it.
        unseen: for requests with a token that the scheduler had not seen: how many, and the step of the latest.
        resumed: those that came back after they were preempted.
        starts, ends: by stage. stalled_ms: the first stage had nothing else to do and waited for a token.
    """

    number: int
    tokens: Mapping[str, int]
    sampled: frozenset[str]
    unseen: Mapping[str, tuple[int, int]]
    resumed: frozenset[str]
    starts: list[float]
    ends: list[float]
    stalled_ms: float


@dataclass
class _Waiting:
    """Computed but for the last stage's sampling."""

    step: Step
    scheduled: list[tuple[RequestState, int]]
    hashes: dict[str, int]


class _Result(Future[ModelRunnerOutput]):
    """Moves the engine's clock to the time of its arrival when the engine takes it."""

    def __init__(self, executor: "VirtualExecutor", step: Step, output: ModelRunnerOutput) -> None:
        super().__init__()
        self.set_result(output)
        self._executor, self._step = executor, step

    def result(self, timeout: float | None = None) -> ModelRunnerOutput:
        self._executor.take(self._step)
        return super().result()


class VirtualExecutor(Executor):
    """See the module.

    Attributes:
        now: the engine's time, ms. steps: since `restart`, in order.
    """

    supports_pp = True

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def _init_executor(self) -> None:
        self.stages = self.parallel_config.pipeline_parallel_size
        self.now, self._calls = 0.0, 0
        self._free = [0.0] * self.stages
        self._requests = RequestTable(self.model_config.get_vocab_size())
        self._cache: dict[tuple[int, int], int] = {}
        self._arrived: dict[str, float] = {}
        self._unseen: dict[str, list[int]] = {}
        self._waiting: _Waiting | None = None
        self.restart(Costs())

    def restart(self, costs: Costs) -> None:
        """Other costs and a new record of steps. The clock runs on, until all stages are idle."""
        self.costs = costs
        self.now = max(self.now, self._free[-1] + costs.link_ms)
        self.steps: list[Step] = []

    def collective_rpc(
        self, method: Any, timeout: float | None = None, args: Any = (), kwargs: Any = None, non_block: bool = False
    ) -> list[Any]:
        spec = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
        answers: dict[str, Any] = {
            "get_supported_kv_cache_layouts": ["NHD"],
            "determine_available_memory": 8 << 20,
            "compile_or_warm_up_model": CompilationTimes(0.0, 0.0),
            "get_supported_tasks": ("generate",),
        }
        specs = [{f"layers.{rank}": spec} for rank in range(self.stages)]
        return specs if method == "get_kv_cache_spec" else [answers.get(method)] * self.stages

    def check_health(self) -> None:
        """Never ill."""

    def shutdown(self) -> None:
        """Nothing to end."""

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        self._calls += 1
        scheduled = self._requests.apply(step_of(scheduler_output, (1,)))
        for request_id in scheduler_output.finished_req_ids:
            self._arrived.pop(request_id, None)
            self._unseen.pop(request_id, None)
        resumed = frozenset(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        if scheduled:
            self._compute(scheduled, resumed)
        output = None if scheduled else EMPTY_MODEL_RUNNER_OUTPUT
        if not non_block:
            return output
        future: Future[ModelRunnerOutput | None] = Future()
        future.set_result(output)
        return future

    def _compute(self, scheduled: list[tuple[RequestState, int]], resumed: frozenset[str]) -> None:
        assert self._waiting is None, "a step before the last one was sampled"
        costs = self.costs
        self.now += costs.engine_ms
        unseen = {r.id: (len(n), n[-1]) for r, _ in scheduled if (n := self._unseen.get(r.id))}
        hashes = {request.id: self._write(request, count) for request, count in scheduled}
        sampled = frozenset(r.id for r, _ in scheduled if r.num_computed_tokens >= len(r.token_ids))
        sent = max(self.now + costs.link_ms, self._free[0])
        begin = max([sent, *(self._arrived.get(request.id, 0.0) for request, _ in scheduled)])
        tokens = {request.id: count for request, count in scheduled}
        step = Step(self._calls, tokens, sampled, unseen, resumed, [], [], begin - sent)
        for stage in range(self.stages):
            begin = max(begin, self._free[stage])
            step.starts.append(begin)
            self._free[stage] = begin + costs.step_ms(sum(tokens.values()))
            step.ends.append(self._free[stage])
            begin = self._free[stage] + costs.link_ms
        self._waiting = _Waiting(step, scheduled, hashes)

    def _write(self, request: RequestState, count: int) -> int:
        """Fill the next `count` positions of the request's cache; returns the hash of the last."""
        (table,) = request.block_tables
        size = self.cache_config.block_size
        start = request.num_computed_tokens
        seed = request.sampling.seed or 0
        before = self._cache[table[(start - 1) // size], (start - 1) % size] if start else hash(0)
        for position in range(start, start + count):
            before = hash((before, request.token_ids[position]))
            self._cache[table[position // size], position % size] = before
        request.num_computed_tokens += count
        return hash((before, seed))

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        assert self._waiting is not None
        waiting, self._waiting = self._waiting, None
        step, grammar = waiting.step, grammar_of(grammar_output)
        self._free[-1] = step.ends[-1] = max(step.ends[-1], self.now + self.costs.link_ms)
        answer: list[list[int]] = []
        for request, _ in waiting.scheduled:
            if request.id not in step.sampled:
                answer.append([])
                continue
            allowed = None if grammar is None else grammar.bitmask.get(request.id)
            request.token_ids.append(_token(waiting.hashes[request.id], allowed))
            answer.append([request.token_ids[-1]])
            self._arrived[request.id] = step.ends[-1] + self.costs.link_ms
            self._unseen.setdefault(request.id, []).append(step.number)
        self.steps.append(step)
        index = {request_id: row for row, request_id in enumerate(step.tokens)}
        future = _Result(self, step, ModelRunnerOutput(list(index), index, answer))
        return future if non_block else future.result()

    def take(self, step: Step) -> None:
        """The engine waits for the tokens of `step`."""
        self.now = max(self.now, step.ends[-1] + self.costs.link_ms)
        for request_id in step.sampled:
            if numbers := self._unseen.get(request_id):
                numbers.remove(step.number)


def _token(state: int, allowed: np.ndarray | None) -> int:
    if allowed is None:
        return FIRST_TOKEN + state % (VOCAB_SIZE - FIRST_TOKEN)
    choices = np.flatnonzero(np.unpackbits(allowed.view(np.uint8), bitorder="little")[:VOCAB_SIZE])
    return int(choices[state % len(choices)])


@dataclass(frozen=True)
class Arrival:
    """A request; abort_ms after its arrival its client gives up."""

    prompt: Sequence[int]
    params: SamplingParams
    at_ms: float = 0.0
    priority: int = 0
    abort_ms: float | None = None


@dataclass
class Played:
    """What came of some requests; times in ms from the first arrival, requests in the order given.

    Attributes:
        tokens: of each completion of each request. times: when each token of its first completion reached the engine.
        reasons: why its first completion ended; None if it was aborted.
    """

    steps: list[Step]
    began: float
    tokens: list[list[list[int]]]
    times: list[list[float]]
    reasons: list[str | None] = field(default_factory=list)

    def window(self, warm: float = 0.0) -> tuple[float, float]:
        """While all requests are running: from `warm` ms after the last has its first token until one has its last."""
        return max(own[0] for own in self.times) + warm, min(own[-1] for own in self.times)

    def idle(self, window: tuple[float, float]) -> list[float]:
        """Share of the window in which each stage computes nothing."""
        first, last = (edge + self.began for edge in window)
        busy = [0.0] * len(self.steps[0].starts)
        for step in self.steps:
            for stage, (start, end) in enumerate(zip(step.starts, step.ends, strict=True)):
                busy[stage] += max(0.0, min(end, last) - max(start, first))
        return [1 - own / (last - first) for own in busy]

    def rate(self, window: tuple[float, float]) -> float:
        """Tokens per second in the window: of each stream, from its first to its last one there."""
        first, last = window
        seen = [[time for time in own if first <= time <= last] for own in self.times]
        return sum(1000 * (len(own) - 1) / (own[-1] - own[0]) for own in seen if len(own) > 1)


class Pipeline:
    """An engine over virtual stages."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.core = llm.llm_engine.engine_core.engine_core
        self.executor: VirtualExecutor = self.core.model_executor
        self._plays = 0

    def play(self, arrivals: Sequence[Arrival], costs: Costs) -> Played:
        """Serve requests until all have ended. They are seen, as by a real engine, when it is not waiting."""
        executor, engine = self.executor, self.llm.llm_engine
        executor.restart(costs)
        self._plays += 1
        began = executor.now
        names = {f"{self._plays}-{index}": index for index in range(len(arrivals))}
        coming = sorted(names, key=lambda name: arrivals[names[name]].at_ms)
        aborts = {n: a.at_ms + a.abort_ms for n, i in names.items() if (a := arrivals[i]).abort_ms is not None}
        empty: list[list[list[int]]] = [[[]] * arrival.params.n for arrival in arrivals]
        played = Played([], began, empty, [[] for _ in arrivals], [None] * len(arrivals))
        while coming or engine.has_unfinished_requests():
            if not engine.has_unfinished_requests():
                executor.now = max(executor.now, began + arrivals[names[coming[0]]].at_ms)
            while coming and executor.now >= began + arrivals[names[coming[0]]].at_ms:
                name = coming.pop(0)
                arrival = arrivals[names[name]]
                prompt = {"prompt_token_ids": list(arrival.prompt)}
                engine.add_request(name, prompt, arrival.params, priority=arrival.priority)
            for name in [name for name, at in aborts.items() if name not in coming and executor.now - began >= at]:
                del aborts[name]
                engine.abort_request([name])
            for output in engine.step():
                index = names[output.request_id]
                for completion in output.outputs:
                    played.tokens[index][completion.index] = list(completion.token_ids)
                    if completion.index == 0:
                        new = len(completion.token_ids) - len(played.times[index])
                        played.times[index] += [executor.now - began] * new
                        played.reasons[index] = completion.finish_reason
        played.steps = executor.steps
        return played


@contextmanager
def engine(
    stages: int, scheduler: type | None = None, folder: Path | None = None, **arguments: Any
) -> Iterator[Pipeline]:
    """An engine whose scheduler is Pomarium's, or `scheduler`. Context 2048, 64 sequences, no prefix cache by default.

    Args:
        folder: with a config.json, and a tokenizer if `skip_tokenizer_init` is False. One is made up by default.
    """
    defaults = {
        "max_model_len": 2048,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "distributed_executor_backend": VirtualExecutor,
        "pipeline_parallel_size": stages,
        "scheduler_cls": scheduler,
    }
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "POMARIUM_STEP_SECONDS": "0"}
    with tempfile.TemporaryDirectory() as made_up, patch.dict(os.environ, variables):
        (Path(made_up) / "config.json").write_text(json.dumps(MODEL_CONFIG))
        llm = LLM(str(folder or made_up), **{**defaults, **arguments})
        try:
            yield Pipeline(llm)
        finally:
            core = llm.llm_engine.engine_core.engine_core
            core.structured_output_manager.clear_backend()
            core.scheduler.shutdown()
            vllm.envs.disable_envs_cache()
            gc.unfreeze()


def plain(tokens: int, **changes: Any) -> SamplingParams:
    """Greedy, `tokens` long, text not wanted."""
    defaults = {"max_tokens": tokens, "ignore_eos": True, "detokenize": False, "temperature": 0}
    return SamplingParams(**{**defaults, **changes})
