"""Drives the worker's engine without vLLM: a small scheduler with chunks, scrambled blocks and forced preemption.

    Driver(model, block_size) --run(prompts, schedule)--> tokens and logits of each request

It keeps its own block accounting, so what the worker is told is exactly what a test chose.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import mlx.core as mx
import numpy as np

from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch
from pomarium.worker.forward import ContiguousForward, Forward, PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.model_runner import ModelRunner, StepStats, UnreadStep
from pomarium.worker.models.paged import PagedModel
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.sampling_params import SamplingParams
from pomarium.worker.step import CachedRequest, NewRequest, Step, StepResult

GREEDY = SamplingParams(temperature=0.0)
UNKNOWN = -1
"""A token that was sampled and is not read."""

Place = tuple[list[int], int]
"""Where a token that is not read yet goes."""


@dataclass
class Recorder:
    """A Forward that keeps the logits it returned, by request and position."""

    inner: Forward
    logits: dict[str, dict[int, np.ndarray]] = field(default_factory=dict)

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        every_row = np.arange(len(batch.token_ids), dtype=np.int32)
        full = self.inner.run(
            Batch(batch.sequences, batch.token_ids, batch.positions, every_row, every_row, batch.samplers, {}),
            token_ids,
        )
        rows = np.array(full.astype(mx.float32))
        first = 0
        for sequence in batch.sequences:
            kept = self.logits.setdefault(sequence.request_id, {})
            for offset in range(sequence.length):
                kept[sequence.start + offset] = rows[first + offset]
            first += sequence.length
        return full[mx.array(batch.logit_rows)]

    def release(self, request_ids: Sequence[str]) -> None:
        self.inner.release(request_ids)


@dataclass
class Live:
    """A request in the driver's scheduler."""

    id: str
    tokens: list[int]
    prompt: int
    wanted: int
    sampling: SamplingParams
    computed: int = 0
    tables: tuple[list[int], ...] = ()
    started: bool = False
    resumed: bool = False


class Driver:
    """A ModelRunner over a paged pool (or mlx-lm's caches) and the scheduler that feeds it.

    Args:
        late: the scheduler plans a step before it has read the tokens of the one before, as vLLM's does.
    """

    def __init__(
        self,
        model: PagedModel,
        block_size: int = 16,
        num_blocks: int = 256,
        paged: bool = True,
        late: bool = False,
    ) -> None:
        self.layout = single_group_layout(model.layers, block_size, num_blocks)
        self.block_size = block_size
        inner: Forward
        if paged:
            inner = PagedForward(model, GatheredAttention(PagedPool(self.layout, model.dtype)))
        else:
            inner = ContiguousForward(model.module)
        self.recorder = Recorder(inner)
        sampler = Sampler(model.vocab_size, engine_seed=0)
        self.stats: list[StepStats] = []
        self.runner = ModelRunner(self.recorder, sampler, self.stats.append, ahead=late)
        self.late = late
        self.unread: deque[tuple[StepResult | UnreadStep, dict[str, Place]]] = deque()
        # Scrambled, never 0: vLLM keeps that block as its null block.
        self.free = np.random.default_rng(7).permutation(np.arange(1, num_blocks)).tolist()

    def run(
        self,
        prompts: dict[str, Sequence[int]],
        new_tokens: int,
        *,
        sampling: SamplingParams | dict[str, SamplingParams] = GREEDY,
        chunks: Sequence[int] = (1 << 30,),
        preempt: Callable[[int], Sequence[str]] = lambda step: (),
        max_steps: int = 500,
    ) -> dict[str, list[int]]:
        """Generate `new_tokens` for each prompt, all in one batch.

        Args:
            chunks: prompt tokens per request and step, cycled over.
            preempt: step number -> requests whose blocks are taken away before it; they start over from their tokens.
        """
        live = [
            Live(
                name, list(prompt), len(prompt), new_tokens, sampling[name] if isinstance(sampling, dict) else sampling
            )
            for name, prompt in prompts.items()
        ]
        chunk, done = cycle(chunks), frozenset[str]()
        for number in range(max_steps):
            for request in live:
                if request.id in preempt(number) and request.started:
                    self._take_blocks(request)
            step = self._plan(live, chunk, done)
            if not step.num_scheduled_tokens:
                self.read_all_but(0)
                return {request.id: request.tokens[request.prompt :] for request in live}
            self.runner.execute(step)
            self.sampled(live, step, self.runner.sample())
            ended = (r for r in live if len(r.tokens) - r.prompt >= r.wanted)
            done = frozenset(r.id for r in ended if r.id in step.num_scheduled_tokens)
        raise AssertionError(f"not done after {max_steps} steps")

    def sampled(self, live: Sequence[Live], step: Step, result: StepResult | UnreadStep) -> None:
        """Count what a step computed, and read its tokens, or those of the step before."""
        places: dict[str, Place] = {}
        for request in (request for request in live if request.id in step.num_scheduled_tokens):
            request.computed += step.num_scheduled_tokens[request.id]
            if request.computed >= len(request.tokens):
                places[request.id] = request.tokens, len(request.tokens)
                request.tokens.append(UNKNOWN)
        self.unread.append((result, places))
        self.read_all_but(1 if self.late else 0)

    def read_all_but(self, newest: int) -> None:
        while len(self.unread) > newest:
            result, places = self.unread.popleft()
            read = result.read()
            sampled = {name: tokens for name, tokens in zip(read.request_ids, read.token_ids, strict=True) if tokens}
            assert sampled.keys() == places.keys()
            for name, (tokens, index) in places.items():
                (tokens[index],) = sampled[name]

    def _plan(self, live: list[Live], chunk: "cycle[int]", done: frozenset[str]) -> Step:
        scheduled: dict[str, int] = {}
        new: list[NewRequest] = []
        cached: list[CachedRequest] = []
        for request in live:
            if len(request.tokens) - request.prompt >= request.wanted:
                continue
            count = min(next(chunk), len(request.tokens) - request.computed)
            fresh = self._grow(request, request.computed + count)
            scheduled[request.id] = count
            if not request.started:
                tokens = tuple(request.tokens)
                new.append(NewRequest(request.id, tokens, request.prompt, 0, fresh, request.sampling))
            else:
                tokens = tuple(request.tokens) if request.resumed else None
                cached.append(CachedRequest(request.id, request.computed, fresh, request.resumed, tokens))
            request.started, request.resumed = True, False
        return Step(scheduled, tuple(new), tuple(cached), done)

    def _grow(self, request: Live, length: int) -> tuple[tuple[int, ...], ...]:
        if not request.tables:
            request.tables = tuple([] for _ in self.layout.groups)
        fresh = []
        for table in request.tables:
            count = -(-length // self.block_size) - len(table)
            blocks = [self.free.pop() for _ in range(count)]
            table += blocks
            fresh.append(tuple(blocks))
        return tuple(fresh)

    def _take_blocks(self, request: Live) -> None:
        for table in request.tables:
            self.free[:0] = table
        request.tables, request.computed, request.resumed = (), 0, True
        # vLLM drops a token that it has not read when it preempts its request: it is sampled once more.
        request.tokens = [token for token in request.tokens if token != UNKNOWN]
