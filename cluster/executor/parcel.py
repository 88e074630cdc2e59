"""What of a step travels to the workers: all but what only the engine reads.

Forms that clients want answers in are compiled in the engine; workers see masks. As it was sent a form is a value of
the client's making, whose nesting would meet pickle's recursion in the path of everybody's step.
"""

import copy
from dataclasses import replace

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


def for_workers(output: SchedulerOutput) -> SchedulerOutput:
    """`output` without the constraints of structured output; `output` itself if it has none."""
    if not any(_constrained(new.sampling_params) for new in output.scheduled_new_reqs):
        return output
    return replace(output, scheduled_new_reqs=[_plain(new) for new in output.scheduled_new_reqs])


def _constrained(params: SamplingParams | None) -> bool:
    return params is not None and params.structured_outputs is not None


def _plain(new: NewRequestData) -> NewRequestData:
    if not _constrained(new.sampling_params):
        return new
    params = copy.copy(new.sampling_params)  # the scheduler's own goes on to need them
    params.structured_outputs = None
    return replace(new, sampling_params=params)
