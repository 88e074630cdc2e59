"""Executes an engine's calls on vLLM's worker, in order, on one thread.

    Call --decode--> method of WorkerWrapperBase (vLLM: hosts `parallel_config.worker_cls`) --> Report

All MLX work of the process happens on this thread, for MLX's streams belong to threads.
"""

import multiprocessing
import queue
from collections.abc import Callable
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from pomarium.cluster.executor.codec import decode, describe, encode
from pomarium.cluster.executor.step_metrics import StepMetrics
from pomarium.cluster.executor.timed import BudgetedStep
from pomarium.proto import control_pb2 as pb
from pomarium.worker.metal_worker import MetalWorker
from pomarium.worker.pipeline.place import Surroundings

INIT_WORKER = "init_worker"
"""First call: keyword arguments of vLLM's WorkerBase, and `surroundings` of worker.pipeline.place."""
LISTEN = "listen"
"""A stage begins to listen for the others; gives its address. What fails on its links is reported as a call's failure
would be."""
NO_CALL = (1 << 64) - 1
"""Number of a call that was never made."""


class WorkerHost:
    """vLLM's worker of one rank."""

    def __init__(self, rank: int) -> None:
        self._wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=rank)
        self._metrics: StepMetrics | None = None
        self._report: Callable[[pb.Report], None] = lambda report: None

    @property
    def worker(self) -> Any:
        """The worker, once INIT_WORKER made it."""
        return self._wrapper.worker

    def run(self, calls: "queue.SimpleQueue[pb.Call | None]", report: Callable[[pb.Report], None]) -> None:
        """Execute calls until one is None; an actor's process ends before, when the engine's stream does."""
        self._report = report
        while (call := calls.get()) is not None:
            answer = self.execute(call)
            if answer is not None:
                report(answer)

    def execute(self, call: pb.Call) -> pb.Report | None:
        """Report of one call, None if it went well and nobody wants its result."""
        try:
            method, args, kwargs = decode(call.payload)
            result = self._invoke(method, args, kwargs)
            if isinstance(result, AsyncModelRunnerOutput):
                result = result.get_output()
            if not call.wants_result:
                return None
            return pb.Report(result=pb.Result(seq=call.seq, payload=encode(result)))
        except BaseException as error:  # noqa: BLE001 - reported to the engine, which decides
            return pb.Report(failure=describe(call.seq, call.method, error))

    def _invoke(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == INIT_WORKER:
            return self._init(**kwargs)
        if method == LISTEN:
            return self.worker.listen(self._on_link_failure)
        if self._metrics is not None and args and isinstance(args[0], BudgetedStep):
            self._metrics.budget(args[0].step_budget)
        return run_method(self._wrapper, method, args, kwargs)

    def _init(self, surroundings: Surroundings, **kwargs: Any) -> None:
        # A lock cannot travel; vLLM wants one for a multimodal cache shared between the workers of a machine.
        self._wrapper.init_worker([{**kwargs, "shared_worker_lock": multiprocessing.Lock()}])
        worker = self.worker
        if isinstance(worker, MetalWorker):
            worker.take_place(surroundings)
            self._metrics = StepMetrics(worker.model_config.served_model_name, worker.rank)
            worker.subscribe(self._metrics)

    def _on_link_failure(self, error: Exception) -> None:
        self._report(pb.Report(failure=describe(NO_CALL, "handoff", error)))
