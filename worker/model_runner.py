"""One step of the model: what changed -> rows -> logits -> sampled tokens.

    execute(Step): RequestTable.apply -> build_batch -> Forward.run      (the logits wait)
    sample(Grammar): Sampler -> tokens appended to the table -> StepResult

Two calls because the scheduler computes a grammar's bitmask while the forward pass runs. Steps come strictly in order,
so one step's logits wait at a time.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.worker.batch import Batch, build_batch
from pomarium.worker.forward import Forward
from pomarium.worker.requests import RequestState, RequestTable
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
    """A step whose logits have been computed and not yet sampled."""

    scheduled: list[tuple[RequestState, int]]
    batch: Batch
    logits: mx.array
    seconds: float
    waited: float


class ModelRunner:
    """Runs steps over a Forward.

    Args:
        on_step: called with each step's figures.
        processors, invariant_processors: the operator's own logits processors (see Sampler.sample).
        links: to the first stage, if `forward` is the last one of several.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        on_step: Callable[[StepStats], None],
        processors: LogitsProcessor | None = None,
        invariant_processors: LogitsProcessor | None = None,
        links: Links | None = None,
    ) -> None:
        self.requests = RequestTable(sampler.vocab_size)
        self._forward = forward
        self._sampler = sampler
        self._on_step = on_step
        self._processors = processors
        self._invariant_processors = invariant_processors
        self._links = links or _NoLinks()
        self._waiting: _Waiting | None = None

    def execute(self, step: Step) -> bool:
        """Take in what changed and compute the scheduled tokens; False if none were scheduled (do not sample then)."""
        began, waited = time.perf_counter(), self._links.waited_s
        self._forward.release(step.finished)
        scheduled = self.requests.apply(step)
        if not scheduled:
            return False
        batch = build_batch(scheduled)
        logits = self._forward.run(batch)
        for request, count in scheduled:
            request.num_computed_tokens += count
        waited = self._links.waited_s - waited
        self._waiting = _Waiting(scheduled, batch, logits, time.perf_counter() - began - waited, waited)
        return True

    def sample(self, grammar: Grammar | None = None) -> StepResult:
        """Sample the step that `execute` computed.

        Raises:
            RuntimeError: without such a step.
        """
        if self._waiting is None:
            raise RuntimeError("sample() without a step that was executed")
        waiting, self._waiting = self._waiting, None
        began = time.perf_counter()
        batch = waiting.batch
        prompt_logprobs = self._prompt_logprobs(waiting)
        requests = [self.requests[request_id] for request_id in batch.samplers]
        sampled = self._sampler.sample(
            waiting.logits[mx.array(batch.sample_index)] if requests else waiting.logits,
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
        tokens = dict(zip(batch.samplers, sampled.token_ids, strict=True))
        result = StepResult(
            tuple(request.id for request, _ in waiting.scheduled),
            tuple((tokens[request.id],) if request.id in tokens else () for request, _ in waiting.scheduled),
            sampled.logprobs,
            prompt_logprobs,
        )
        self._on_step(
            StepStats(
                len(waiting.scheduled),
                len(batch.token_ids),
                len(requests),
                self.requests.cached_tokens,
                waiting.seconds + time.perf_counter() - began - handing,
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
    prompt = request.token_ids[: request.num_prompt_tokens]
    return SamplingRow(request.id, request.sampling, prompt, request.output_token_ids)


def _join(chunks: list[Logprobs]) -> Logprobs:
    return Logprobs(
        np.concatenate([chunk.token_ids for chunk in chunks]),
        np.concatenate([chunk.logprobs for chunk in chunks]),
        np.concatenate([chunk.ranks for chunk in chunks]),
    )
