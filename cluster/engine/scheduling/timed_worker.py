"""The worker that the platform names: MetalWorker whose outputs carry the time of the step (timed.py)."""

from collections.abc import Callable
from typing import Any

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from pomarium.cluster.executor.timed import timed
from pomarium.worker.metal_worker import MetalWorker
from pomarium.worker.model_runner import StepStats
from pomarium.worker.pipeline.runner import RelayRunner


class TimedWorker(MetalWorker):
    """See the module. A stage that does not sample answers `execute_model` with its time alone."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._step_s = 0.0
        self.subscribe(self._note)

    def _note(self, stats: StepStats) -> None:
        self._step_s = stats.seconds

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        output = super().execute_model(scheduler_output)
        relayed = output is None and isinstance(self.runner, RelayRunner)
        return timed(EMPTY_MODEL_RUNNER_OUTPUT, self._step_s) if relayed else output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        output = super().sample_tokens(grammar_output)
        if isinstance(output, AsyncModelRunnerOutput):
            return _TimedLater(output, lambda: self._step_s)
        return timed(output, self._step_s)


class _TimedLater(AsyncModelRunnerOutput):
    """An output that is read later; only then is its step's time known."""

    def __init__(self, output: AsyncModelRunnerOutput, step_s: Callable[[], float]) -> None:
        self._output = output
        self._step_s = step_s

    def get_output(self) -> ModelRunnerOutput:
        """Wait for the tokens."""
        output = self._output.get_output()
        return timed(output, self._step_s())
