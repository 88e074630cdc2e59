"""Workers for `benchmarks/endpoint.py --stub`: --worker-cls endpoint_worker.PacedWorker.

The worker computes nothing (tests/rack/stub_worker.py), and its step ends PERIOD_S after the last one did, or as soon
as it can, so that an engine gives each of its streams a token in that time. All else is what serves: EngineCore with
vLLM's scheduler, the replica with vLLM's front end (AsyncLLM, detokenisation, its HTTP application), Serve, ingress.
"""

import time

from stub_worker import StubWorker
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

PERIOD_S = 0.02


class PacedWorker(StubWorker):
    """See the module."""

    _due = 0.0

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """As StubWorker, in time."""
        output = super().execute_model(scheduler_output)
        if scheduler_output.num_scheduled_tokens:
            now = time.monotonic()
            # Late by more than a period is after a pause: a step then takes a whole one, and what is lost is lost.
            self._due = self._due + PERIOD_S if now < self._due + 2 * PERIOD_S else now + PERIOD_S
            time.sleep(max(0.0, self._due - now))
        return output
