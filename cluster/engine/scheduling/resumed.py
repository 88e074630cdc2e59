"""vLLM's schedulers, and requests whose first tokens another engine made (engine/resumption.py).

    SamplingParams.extra_args[OUTPUTS] --add_request--> Request.output_token_ids, as of one that was preempted
    schedule() --prefill_token_ids: prompt and outputs--> the workers, which compute both as a prompt
               --SeeingStep: images that the step computes--> likewise (worker/vllm_step.py)

They are outputs and no prompt: penalties, min_tokens, max_tokens, grammars and draws go on as if nothing had happened.
They are not emitted: the front end has them. vLLM 0.29.
"""

import copy
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from pomarium.cluster.engine.scheduling.resumption_key import OUTPUTS
from pomarium.worker.vllm_step import seeing


class ResumingScheduler(Scheduler):
    """For async scheduling off."""

    grammar_compile_error_reqs: set[str]

    def add_request(self, request: Request) -> None:
        if outputs := _taken(request):
            request.append_output_token_ids(outputs)
            request.num_preemptions = 1  # what is found cached may reach into the outputs
        super().add_request(request)

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        step = super().schedule(throttle_prefills)
        for new in step.scheduled_new_reqs:
            request = self.requests[new.req_id]
            if request.num_output_tokens:
                new.prefill_token_ids = list(request.all_token_ids)
        return seeing(step, self.requests)

    def _try_promote_blocked_waiting_request(self, request: Request) -> bool:
        """vLLM's; a grammar that is compiled takes in the outputs first."""
        compiled = request.status is RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        if not super()._try_promote_blocked_waiting_request(request):
            return False
        if compiled and request.num_output_tokens and not self._advanced(request, list(request.output_token_ids)):
            self.grammar_compile_error_reqs.add(request.request_id)
            return False
        return True

    def _advanced(self, request: Request, outputs: Sequence[int]) -> bool:
        """Whether the request's grammar takes `outputs`, as far as they are not the model's reasoning."""
        forms = self.structured_output_manager
        forms.should_fill_bitmask(request)  # finds out whether the prompt ends the reasoning
        if not forms.should_advance(request, new_token_ids=outputs):
            return True
        rest = forms.trim_reasoning_for_advance(request, outputs)
        return not rest or bool(request.structured_output_request.grammar.accept_tokens(request.request_id, rest))


class ResumingAsyncScheduler(ResumingScheduler, AsyncScheduler):
    """For async scheduling."""


def _taken(request: Request) -> list[int]:
    """The outputs that `request` brings, which nobody behind this reads any more."""
    params = request.sampling_params
    extra: dict[str, Any] = (params.extra_args if params is not None else None) or {}
    if OUTPUTS not in extra:
        return []
    request.sampling_params = copy.copy(params)
    request.sampling_params.extra_args = {name: value for name, value in extra.items() if name != OUTPUTS} or None
    return [int(token) for token in extra[OUTPUTS]]
