"""vLLM's schedulers with as many disjoint sets of requests in flight as there are stages.

    vLLM's state --_facts--> share.plan_step --StepPlan--> limits of one step --> vLLM's own schedule()

vLLM still does all the scheduling: blocks, prefix cache, preemption, priorities, structured output. What is added is
which of its running requests take part in a step, how many may be admitted, and how many tokens it may have.

The invariant that workers and engine build on, steps counted by calls of schedule(), empty ones included:

    if step n samples a token of a request, the request's next step is n + S at the earliest, or comes after the
    scheduler has seen that token.

So a request never computes on one stage while its token is computed on another; the queue of S + 1 steps holds at most
two unseen tokens of a request; and a step that needs a token unseen by the grammar (which the engine does not sample
before it has processed the oldest step in the queue) needs that of the oldest. Chunks of a prompt that sample nothing
may follow each other in every step: each stage computes them in order.

A request that is preempted with tokens in flight is resumed by vLLM after all of them have arrived, so what it is
resumed with is complete.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain, islice
from typing import Any

from vllm.config import SchedulerConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from pomarium.cluster.engine.scheduling.resumed import ResumingScheduler
from pomarium.cluster.engine.scheduling.share import Limits, Running, StepPlan, Waiting, cohorts, plan_step


class SyncCohortScheduler(ResumingScheduler):
    """For async scheduling off: a request is scheduled again when its token has come back to the scheduler.

    Attributes:
        cohorts: sets of requests in flight, at least as many as stages.
    """

    scheduler_config: SchedulerConfig
    max_num_running_reqs: int
    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.cohorts = cohorts(self.parallel_config.pipeline_parallel_size)
        self.scheduler_config = copy(self.scheduler_config)  # one step's limits are nobody else's
        self._served: dict[str, int] = {}

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        config = self.scheduler_config
        limits = Limits(
            self.max_num_scheduled_tokens, config.long_prefill_token_threshold, config.enable_chunked_prefill
        )
        facts = [fact for request in self.running if (fact := self._facts(request)) is not None]
        plan = plan_step(self.current_step + 1, self.cohorts, facts, self._admissible(limits.step_tokens), limits)
        with self._limited(plan):
            return super().schedule(throttle_prefills)

    def _facts(self, request: Request) -> Running | None:
        """None if nothing is left to compute but what is in flight."""
        unseen = request.num_output_placeholders
        if unseen and request.num_computed_tokens + 2 - unseen >= request.num_prompt_tokens + request.max_tokens:
            return None
        tokens = min(request.num_tokens_with_spec + unseen, self.max_model_len - 1) - request.num_computed_tokens
        in_flight = request.num_in_flight_tokens > 0
        if tokens <= 0 and not in_flight:
            return None
        served = self._served.get(request.request_id, 0)
        return Running(request.request_id, tokens, request.is_prefill_chunk, served, in_flight)

    def _admissible(self, step_tokens: int) -> Waiting:
        """Of those that wait, as many as may run; no more than fill a round of steps."""
        sessions = self.num_waiting_for_streaming_input
        waiting = len(self.waiting) + len(self.skipped_waiting) - sessions
        count = max(0, min(waiting, self.max_num_running_reqs - len(self.running) - sessions))
        if not count:
            return Waiting(0, 0)
        tokens = 0
        for request in islice(chain(self.skipped_waiting, self.waiting), count):
            tokens += request.num_tokens - request.num_computed_tokens
            if tokens >= self.cohorts * step_tokens:
                break
        return Waiting(count, tokens)

    @contextmanager
    def _limited(self, plan: StepPlan) -> Iterator[None]:
        """vLLM's limits lowered to the plan's for one schedule()."""
        config, step = self.scheduler_config, self.current_step + 1
        before = self.max_num_running_reqs, self.max_num_scheduled_tokens, config.long_prefill_token_threshold
        for request in self.running:
            request.next_decode_eligible_step = step + (request.request_id not in plan.ids)
        # vLLM sends all tokens of each request that was not in the step before; workers keep them.
        self.prev_step_scheduled_req_ids.update(request.request_id for request in self.running)
        running = len(self.running) + self.num_waiting_for_streaming_input
        self.max_num_running_reqs = min(before[0], running + plan.admitted)
        self.max_num_scheduled_tokens = plan.limits.step_tokens
        config.long_prefill_token_threshold = plan.limits.request_tokens
        try:
            yield
        finally:
            self.max_num_running_reqs, self.max_num_scheduled_tokens, config.long_prefill_token_threshold = before

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            if not self.requests[request_id].is_prefill_chunk:
                self._served[request_id] = self.current_step
        for request_id in scheduler_output.finished_req_ids:
            self._served.pop(request_id, None)


class CohortScheduler(SyncCohortScheduler, AsyncScheduler):
    """For async scheduling: a request's next step is queued on the stages before its token is back (see the module)."""
