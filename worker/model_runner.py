"""One step of the model: what changed -> rows -> logits -> sampled tokens.

    execute(Step): RequestTable.apply -> build_batch -> Forward.run      (the logits wait)
    sample(Grammar): Sampler -> tokens appended to the table -> StepResult
                            `-- ahead: tokens stay on the device -> UnreadStep --read--> StepResult

Two calls because the scheduler computes a grammar's bitmask while the forward pass runs. Steps come strictly in order,
so one step's logits wait at a time. Ahead, the tokens of the step before may be unread when a step comes: the table
holds -1 - i for token i of that step, and the step takes it from there on the device. What came in between, a request
that ended or was preempted, cost one row that nobody reads.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.worker.attention.decode_graphs import rows_of
from pomarium.worker.batch import Batch, build_batch
from pomarium.worker.forward import Forward
from pomarium.worker.requests import RequestState, RequestTable
from pomarium.worker.sampling.logprobs import Scored, gather
from pomarium.worker.sampling.rows import LogitsProcessor, SamplingRow
from pomarium.worker.sampling.sampler import Sampler
from pomarium.worker.step import Grammar, Logprobs, Step, StepResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepStats:
    """Figures of one step.

    Attributes:
        rows: tokens computed. cached_tokens: held by live requests after the step, a shared prefix counted for each.
        seconds: forward and sampling, without the wait between them.
        waited, handing: seconds spent on other stages beside that: waiting for their data, and handing ours on.
    """

    requests: int
    rows: int
    sampled: int
    cached_tokens: int
    seconds: float
    waited: float = 0.0
    handing: float = 0.0


class Links(Protocol):
    """What the last stage of a pipeline tells the first, and the seconds that its links have taken so far."""

    waited_s: float
    handing_s: float

    def return_tokens(self, token_ids: Sequence[int]) -> None:
        """Hand on the tokens of the step that was sampled."""
        ...


class _NoLinks:
    """The whole model is here."""

    waited_s = handing_s = 0.0

    def return_tokens(self, token_ids: Sequence[int]) -> None:
        """Nobody else needs them."""


@dataclass(frozen=True)
class _Waiting:
    """A step whose logits are computed, or on their way, and not yet sampled. began: of `time.perf_counter`."""

    scheduled: list[tuple[RequestState, int]]
    batch: Batch
    logits: mx.array
    began: float
    seconds: float
    waited: float


@dataclass(frozen=True)
class UnreadStep:
    """A step whose tokens are still on the device.

    Attributes:
        request_ids: of the step, in order. samplers: those that sampled, in order.
        token_ids: int32 (R,), of the samplers. places: the list and index where each of them is to be entered.
        copy: the same tokens for whoever reads them, on another thread perhaps: MLX's arrays are not for two at once.
        scored: log-probabilities that were asked for, for the same reader.
        ended: told once the tokens are known.
    """

    request_ids: tuple[str, ...]
    samplers: tuple[str, ...]
    token_ids: mx.array
    copy: mx.array
    scored: list[Scored]
    places: tuple[tuple[list[int], int], ...]
    ended: Callable[[], None]

    def read(self) -> StepResult:
        """Wait for the tokens. To be called once, on any thread, by whoever tells the scheduler of them."""
        token_ids = _on_host(self.copy)
        self.ended()
        tokens = _by_request(self.request_ids, self.samplers, token_ids)
        return StepResult(self.request_ids, tokens, gather(self.scored, token_ids))

    def enter(self) -> None:
        """Put the tokens in the place of what stands for them. A list that a request has no more is nobody's."""
        for (tokens, index), token in zip(self.places, _on_host(self.token_ids), strict=True):
            tokens[index] = token


def _by_request(
    request_ids: Sequence[str], samplers: Sequence[str], token_ids: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Of each request the token that it sampled, or none."""
    tokens = dict(zip(samplers, token_ids, strict=True))
    return tuple((tokens[request_id],) if request_id in tokens else () for request_id in request_ids)


def _on_host(token_ids: mx.array) -> list[int]:
    found: list[int] = np.array(token_ids).tolist()
    return found


class ModelRunner:
    """Runs steps over a Forward.

    Args:
        on_step: called with each step's figures.
        processors, invariant_processors: the operator's own logits processors (see Sampler.sample).
        links: to the first stage, if `forward` is the last one of several.
        ahead: sampled tokens stay on the device and enter the next step there, so that it is built and sent while the
            last one is computed. A step with a request that the host must look at (Sampler.on_device) is waited for.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        on_step: Callable[[StepStats], None],
        processors: LogitsProcessor | None = None,
        invariant_processors: LogitsProcessor | None = None,
        links: Links | None = None,
        ahead: bool = False,
    ) -> None:
        self.requests = RequestTable(sampler.vocab_size)
        self._forward = forward
        self._sampler = sampler
        self._on_step = on_step
        self._processors = processors
        self._invariant_processors = invariant_processors
        self._links = links or _NoLinks()
        self._ahead = ahead and processors is None and invariant_processors is None
        self._waiting: _Waiting | None = None
        self._unread: deque[UnreadStep] = deque()
        self._last_ended = 0.0

    def execute(self, step: Step) -> bool:
        """Take in what changed and compute the scheduled tokens; False if none were scheduled (do not sample then)."""
        began, waited = time.perf_counter(), self._links.waited_s
        self._forward.release(step.finished)
        # The scheduler has the tokens of all steps but the last one: reading them again does not wait.
        self._enter_all_but(1)
        scheduled = self.requests.apply(step)
        if not scheduled:
            return False
        if self._unread and not all(self._on_device(request) for request, _ in scheduled):
            self._enter_all_but(0)
        batch = build_batch(scheduled)
        logits = self._forward.run(batch, self._tokens(batch.token_ids))
        for request, count in scheduled:
            request.num_computed_tokens += count
        waited = self._links.waited_s - waited
        self._waiting = _Waiting(scheduled, batch, logits, began, time.perf_counter() - began - waited, waited)
        return True

    def sample(self, grammar: Grammar | None = None) -> StepResult | UnreadStep:
        """Sample the step that `execute` computed.

        Raises:
            RuntimeError: without such a step.
        """
        if self._waiting is None:
            raise RuntimeError("sample() without a step that was executed")
        waiting, self._waiting = self._waiting, None
        if self._ahead and waiting.batch.samplers and all(self._on_device(request) for request, _ in waiting.scheduled):
            return self._queue(waiting, grammar)
        return self._sample(waiting, grammar)

    def _on_device(self, request: RequestState) -> bool:
        return self._sampler.on_device(request.sampling) and request.sampling.num_prompt_logprobs is None

    def _queue(self, waiting: _Waiting, grammar: Grammar | None) -> UnreadStep:
        batch = waiting.batch
        requests = [self.requests[request_id] for request_id in batch.samplers]
        logits = rows_of(waiting.logits, batch.sample_index)
        unread = self._unread[-1].token_ids if self._unread else None
        queued = self._sampler.queue(logits, [_sampling_row(request) for request in requests], grammar, unread)
        sampled, copy = queued.token_ids, queued.token_ids + 0
        mx.async_eval(sampled, copy, [part.arrays for part in queued.scored])  # type: ignore[no-untyped-call]
        places = tuple((request.token_ids, len(request.token_ids)) for request in requests)
        for index, request in enumerate(requests):
            request.token_ids.append(-1 - index)
        step = UnreadStep(
            tuple(request.id for request, _ in waiting.scheduled),
            batch.samplers,
            sampled,
            copy,
            queued.scored,
            places,
            partial(self._ended, waiting, len(requests), self.requests.cached_tokens),
        )
        self._unread.append(step)
        return step

    def _ended(self, waiting: _Waiting, sampled: int, cached_tokens: int) -> None:
        """A queued step began when it was sent, or when the one before it ended. On the thread that reads."""
        now = time.perf_counter()
        seconds = now - max(waiting.began, self._last_ended)
        self._last_ended = now
        self._on_step(StepStats(len(waiting.scheduled), len(waiting.batch.token_ids), sampled, cached_tokens, seconds))

    def _enter_all_but(self, newest: int) -> None:
        while len(self._unread) > newest:
            self._unread.popleft().enter()

    def _tokens(self, token_ids: np.ndarray) -> mx.array:
        """int32 (T,) on the device; -1 - i stands for token i of the step that is not read."""
        unread = token_ids < 0
        if not unread.any():
            return mx.array(token_ids)
        sampled = self._unread[-1].token_ids
        index = np.maximum(-1 - token_ids, 0)
        if unread.all() and np.array_equal(index, np.arange(sampled.size)):
            return sampled
        return mx.where(mx.array(unread), sampled[mx.array(index)], mx.array(token_ids))

    def _sample(self, waiting: _Waiting, grammar: Grammar | None) -> StepResult:
        began = time.perf_counter()
        batch = waiting.batch
        prompt_logprobs = self._prompt_logprobs(waiting)
        requests = [self.requests[request_id] for request_id in batch.samplers]
        sampled = self._sampler.sample(
            rows_of(waiting.logits, batch.sample_index) if requests else waiting.logits,
            [_sampling_row(request) for request in requests],
            grammar,
            self._processors,
            self._invariant_processors,
        )
        for request, token_id in zip(requests, sampled.token_ids, strict=True):
            request.token_ids.append(token_id)
        handing = self._links.handing_s
        if requests:
            self._links.return_tokens(sampled.token_ids)
        handing = self._links.handing_s - handing
        request_ids = tuple(request.id for request, _ in waiting.scheduled)
        tokens = _by_request(request_ids, batch.samplers, sampled.token_ids)
        result = StepResult(request_ids, tokens, sampled.logprobs, prompt_logprobs)
        self._last_ended = time.perf_counter()
        self._on_step(
            StepStats(
                len(waiting.scheduled),
                len(batch.token_ids),
                len(requests),
                self.requests.cached_tokens,
                waiting.seconds + self._last_ended - began - handing,
                waiting.waited,
                handing,
            )
        )
        return result

    def _prompt_logprobs(self, waiting: _Waiting) -> dict[str, Logprobs]:
        """Log-probabilities of the prompts whose first token this step samples: the engine takes them with that."""
        for request_id, (first, last) in waiting.batch.prompt_index.items():
            request = self.requests[request_id]
            wanted = request.sampling.num_prompt_logprobs
            if wanted is None:
                continue
            end = min(request.num_computed_tokens, request.num_prompt_tokens - 1)
            targets = request.token_ids[end - (last - first) + 1 : end + 1]
            request.prompt_logprobs.append(self._sampler.prompt_logprobs(waiting.logits[first:last], targets, wanted))
        finished = {}
        for request in (self.requests[request_id] for request_id in waiting.batch.samplers):
            if request.prompt_logprobs:
                finished[request.id] = _join(request.prompt_logprobs)
                request.prompt_logprobs = []
                # The engine appends what it gets: a request preempted later computes its prompt again, unreported.
                request.sampling = replace(request.sampling, num_prompt_logprobs=None)
        return finished


def _sampling_row(request: RequestState) -> SamplingRow:
    return SamplingRow(request.id, request.sampling, request.token_ids, request.num_prompt_tokens, request.occurrences)


def _join(chunks: list[Logprobs]) -> Logprobs:
    return Logprobs(
        np.concatenate([chunk.token_ids for chunk in chunks]),
        np.concatenate([chunk.logprobs for chunk in chunks]),
        np.concatenate([chunk.ranks for chunk in chunks]),
    )
