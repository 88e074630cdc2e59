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
from pomarium.cluster.step_metrics import StepMetrics
from pomarium.proto import control_pb2 as pb
from pomarium.worker.metal_worker import MetalWorker

INIT_WORKER = "init_worker"
"""First call: keyword arguments of vLLM's WorkerBase."""


class WorkerHost:
    """vLLM's worker of one rank."""

    def __init__(self, rank: int) -> None:
        self._wrapper = WorkerWrapperBase(rpc_rank=0, global_rank=rank)

    def run(self, calls: "queue.SimpleQueue[pb.Call]", report: Callable[[pb.Report], None]) -> None:
        """Execute calls for ever; the process ends when the engine's stream does."""
        while True:
            answer = self.execute(calls.get())
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
            # A lock cannot travel; vLLM wants one for a multimodal cache shared between the workers of a machine.
            self._wrapper.init_worker([{**kwargs, "shared_worker_lock": multiprocessing.Lock()}])
            worker = self._wrapper.worker
            if isinstance(worker, MetalWorker):
                worker.subscribe(StepMetrics(worker.model_config.served_model_name, worker.rank))
            return None
        return run_method(self._wrapper, method, args, kwargs)
