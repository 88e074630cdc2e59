"""vLLM's schedulers, and ours for stages, with a step's tokens bound by the seconds that it is to take.

    running, waiting --Demand--> budget.plan --Budget--> limits of one step --> schedule() of the class behind
    TimedOutput --update_from_output--> StepTimes                              (vLLM's, or the cohorts')

The time is the workers': with async scheduling and stages, what passes in the engine between a step and its result is
mostly the time of other steps. What is scheduled before a result is back is scheduled without it: a device is known
one step later for each one that is under way.

A worker that tells no time, somebody else's, is not bound.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain, islice
from typing import Any

from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from pomarium.cluster.engine.scheduling.budget import Demand, Limits, Prompt, plan, target
from pomarium.cluster.engine.scheduling.resumed import ResumingScheduler
from pomarium.cluster.engine.scheduling.scheduler import CohortScheduler, SyncCohortScheduler
from pomarium.cluster.executor.step_time import StepTimes, Work
from pomarium.cluster.executor.timed import TimedOutput, budgeted, work_of
from pomarium.worker.settings import load

GRAIN = 0.1
"""Share of the target below which times are noise."""

MOST_PROMPTS = 64
"""Waiting requests that are looked at for a step."""

READY = frozenset({RequestStatus.WAITING, RequestStatus.PREEMPTED})


class BoundScheduler(ResumingScheduler):
    """For async scheduling off.

    Attributes:
        target_s: seconds that a step is to take at most; 0: no bound. gap_s: where requests decode; 0: likewise.
        times: what is known of the workers; None: they tell nothing, or it does not matter.
        step_budget: tokens that a step may have, by the latest that could tell.
    """

    scheduler_config: SchedulerConfig
    max_num_running_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scheduler_config = copy(self.scheduler_config)  # one step's limits are nobody else's
        settings = load(os.environ)
        self.target_s, self.gap_s = settings.step_seconds, settings.gap_seconds
        self.times: StepTimes | None = StepTimes(GRAIN * self.target_s) if self.target_s else None
        self.step_budget = self.max_num_scheduled_tokens

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        with self._bound():
            step = super().schedule(throttle_prefills)
        return budgeted(step, self.step_budget)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self.times is not None and scheduler_output.total_num_scheduled_tokens:
            told = isinstance(model_runner_output, TimedOutput)
            self.times = self.times.after(work_of(scheduler_output), model_runner_output.step_s) if told else None
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(scheduler_output, model_runner_output)
        return outputs

    @contextmanager
    def _bound(self) -> Iterator[None]:
        """vLLM's limits lowered to the budget's for one schedule()."""
        config = self.scheduler_config
        before = self.max_num_scheduled_tokens, config.long_prefill_token_threshold
        prompts = self._prompts() if self.times is not None and config.enable_chunked_prefill else []
        if self.times is not None and prompts:
            decoding, stages = self._decoding(), self.parallel_config.pipeline_parallel_size
            target_s = target(decoding, self.target_s, self.gap_s, stages)
            budget = plan(Demand(decoding, prompts, self._room()), self.times, Limits(*before), target_s)
            self.step_budget = budget.ceiling or self.step_budget
            self.max_num_scheduled_tokens = budget.limits.step_tokens
            config.long_prefill_token_threshold = budget.limits.request_tokens
        try:
            yield
        finally:
            self.max_num_scheduled_tokens, config.long_prefill_token_threshold = before

    def _prompts(self) -> list[Prompt]:
        """Those that are being computed, and those of the waiting that may be."""
        prompts = [_prompt(r, r.num_computed_tokens) for r in self.running if r.is_prefill_chunk]
        places = self.max_num_running_reqs - len(self.running) - self.num_waiting_for_streaming_input
        waiting = (r for r in chain(self.skipped_waiting, self.waiting) if r.status in READY)
        for request in islice(waiting, max(0, min(MOST_PROMPTS, places))):
            # All but its last tokens may turn out to be cached.
            cached = self.cache_config.enable_prefix_caching
            prompts.append(_prompt(request, request.num_tokens if cached else request.num_computed_tokens))
        return prompts

    def _decoding(self) -> Work:
        """Rows of a step for requests whose prompts are through; on stages each step takes a share of them."""
        positions = [r.num_computed_tokens for r in self.running if not r.is_prefill_chunk]
        stages = self.parallel_config.pipeline_parallel_size
        return Work(-(-len(positions) // stages), -(-(sum(positions) + len(positions)) // stages))

    def _room(self) -> int:
        """Tokens, about: groups of layers take blocks of their own."""
        blocks = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return int(blocks * self.block_size // max(1, len(self.kv_cache_config.kv_cache_groups)))


def _prompt(request: Request, position: int) -> Prompt:
    return Prompt(max(1, request.num_tokens - request.num_computed_tokens), position)


class BoundAsyncScheduler(BoundScheduler, AsyncScheduler):
    """For async scheduling."""


class BoundSyncCohortScheduler(BoundScheduler, SyncCohortScheduler):
    """For stages, async scheduling off."""


class BoundCohortScheduler(BoundScheduler, CohortScheduler):
    """For stages."""
