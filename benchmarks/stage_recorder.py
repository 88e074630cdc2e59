"""Pomarium's worker that notes when it computes, waits and hands on.

    execute_model, sample_tokens, StepStats --phases--> Interval ...     take() --> what pipeline.py reads

Times are of the system-wide monotonic clock, so that those of several processes of one machine can be compared. What a
step is made of follows one another: it waits for its neighbour's data, computes, and hands its own on.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from intervals import COMPUTE, HANDOFF, WAITING, Interval
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from pomarium.worker.metal_worker import MetalWorker
from pomarium.worker.model_runner import StepStats


def phases(step: int, began: float, ended: float, waited: float, handing: float) -> list[Interval]:
    """One call of a stage as intervals: waiting, then computing, then handing on."""
    starts = (began, began + waited, ended - handing, ended)
    kinds = (WAITING, COMPUTE, HANDOFF)
    found = zip(kinds, starts[:-1], starts[1:], strict=True)
    return [Interval(step, kind, start, end) for kind, start, end in found if end > start]


class RecordingWorker(MetalWorker):
    """See the module. A stage that samples has two calls for a step, any other one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Arguments as vLLM's WorkerBase."""
        super().__init__(*args, **kwargs)
        self.intervals: list[Interval] = []
        self.step = 0
        self._stats: StepStats | None = None
        self._executed = (0.0, 0.0)
        self.subscribe(self._on_step)

    def hold_to_cores(self, cores: Sequence[int]) -> int:
        """Keep all threads of this process on the core of its rank; returns the process' id."""
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setaffinity(int(thread.name), {cores[self.rank]})
        return os.getpid()

    def take(self) -> tuple[list[tuple[int, str, float, float]], float]:
        """Intervals since the last call, their steps counted from 0, and the processor seconds of this process."""
        taken, self.intervals, self.step = self.intervals, [], 0
        return [(i.step, i.kind, i.start, i.end) for i in taken], time.process_time()

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput | None:
        """As MetalWorker's."""
        began = time.monotonic()
        output = super().execute_model(scheduler_output)
        self._executed = began, time.monotonic()
        if (stats := self._stats) is not None:
            self._note(phases(self.step, *self._executed, stats.waited, stats.handing))
        return output

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> ModelRunnerOutput:
        """As MetalWorker's."""
        began = time.monotonic()
        output = super().sample_tokens(grammar_output)
        ended = time.monotonic()
        stats = self._stats
        assert stats is not None
        executed = phases(self.step, *self._executed, stats.waited, 0.0)
        self._note(executed + phases(self.step, began, ended, 0.0, stats.handing))
        return output

    def _on_step(self, stats: StepStats) -> None:
        self._stats = stats

    def _note(self, found: list[Interval]) -> None:
        self.intervals += found
        self._stats = None
        self.step += 1
