"""What scheduler and worker tell each other of a step's time, on the messages that vLLM has for a step.

    scheduler --BudgetedStep: SchedulerOutput and its budget--> worker --TimedOutput: ModelRunnerOutput and seconds-->

Both travel as pickles to processes that have imported these classes of vLLM's, and nothing heavier is imported here.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from pomarium.cluster.executor.step_time import Work, rows_at
from pomarium.worker.vllm_step import SeeingStep


@dataclass
class TimedOutput(ModelRunnerOutput):
    """step_s: seconds that the worker computed, waiting for others left out."""

    step_s: float = 0.0


@dataclass
class BudgetedStep(SeeingStep):
    """step_budget: tokens that a step may have, by the latest that could tell."""

    step_budget: int = 0


def timed(output: ModelRunnerOutput, step_s: float) -> TimedOutput:
    """`output` with the worker's time."""
    return TimedOutput(**vars(output) | {"step_s": step_s})


def slower(output: ModelRunnerOutput, others: Iterable[ModelRunnerOutput]) -> ModelRunnerOutput:
    """`output` of the last stage with the time of the slowest, as far as stages tell theirs."""
    times = [one.step_s for one in (output, *others) if isinstance(one, TimedOutput)]
    return timed(output, max(times)) if times else output


def budgeted(step: SchedulerOutput, tokens: int) -> BudgetedStep:
    """`step` with the budget that it was made under."""
    return BudgetedStep(**vars(step) | {"step_budget": tokens})


def work_of(step: SchedulerOutput) -> Work:
    """What `step` computes. A request that computes one token decodes, or ends a prompt: the work is the same."""
    cached = step.scheduled_cached_reqs
    positions = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    positions |= {new.req_id: new.num_computed_tokens for new in step.scheduled_new_reqs}
    pairs, prompts = 0, False
    for request_id, tokens in step.num_scheduled_tokens.items():
        pairs += rows_at(positions[request_id], tokens).pairs if tokens > 1 else positions[request_id] + 1
        prompts = prompts or tokens > 1
    return Work(step.total_num_scheduled_tokens, pairs, prompts)
