"""Executes an engine's calls on vLLM's worker, in order, on one thread.

    Call --decode--> method of WorkerWrapperBase (vLLM: hosts `parallel_config.worker_cls`) --> Report
                                  `-- an output to be read later --Late, on its own thread--> Report

All MLX work of the process happens on the first thread, for MLX's streams belong to threads; the other one waits for
what is on its way. So the next step is built and sent while the last one is computed. Reports leave in the order of
their calls.
"""

import multiprocessing
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from pomarium.cluster.executor.codec import decode, describe, encode
from pomarium.cluster.executor.prompt_memory import PromptMemory
from pomarium.cluster.executor.step_metrics import PromptMetrics, StepMetrics
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


class Late:
    """Reports that wait for a device, and those behind them, on a thread of their own."""

    def __init__(self, report: Callable[[pb.Report], None]) -> None:
        self._report = report
        self._waiting: queue.SimpleQueue[Callable[[], pb.Report]] = queue.SimpleQueue()
        self._count = 0
        self._counting = threading.Lock()
        threading.Thread(target=self._run, name="late-reports", daemon=True).start()

    def report(self, report: pb.Report) -> None:
        """Now, if nothing waits; else behind what does."""
        with self._counting:
            alone = self._count == 0
        if alone:
            self._report(report)
        else:
            self.await_(lambda: report)

    def await_(self, make: Callable[[], pb.Report]) -> None:
        """Report what `make` gives, which may block."""
        with self._counting:
            self._count += 1
        self._waiting.put(make)

    def _run(self) -> None:
        while True:
            self._report(self._waiting.get()())
            with self._counting:
                self._count -= 1


class WorkerHost:
    """vLLM's worker of one rank."""

    def __init__(self, rank: int) -> None:
        self._wrapper: Any = WorkerWrapperBase(rpc_rank=0, global_rank=rank)
        self._metrics: StepMetrics | None = None
        self._prompts: PromptMetrics | None = None
        self._memory: PromptMemory | None = None
        self._report: Callable[[pb.Report], None] = lambda report: None

    @property
    def worker(self) -> Any:
        """The worker, once INIT_WORKER made it."""
        return self._wrapper.worker

    def run(self, calls: "queue.SimpleQueue[pb.Call | None]", report: Callable[[pb.Report], None]) -> None:
        """Execute calls until one is None; an actor's process ends before, when the engine's stream does."""
        self._report = report
        late = Late(report)
        while (call := calls.get()) is not None:
            answer = self.execute(call)
            if isinstance(answer, pb.Report):
                late.report(answer)
            elif answer is not None:
                late.await_(answer)

    def execute(self, call: pb.Call) -> pb.Report | Callable[[], pb.Report] | None:
        """Report of one call, or what waits for it; None if it went well and nobody wants its result."""
        try:
            method, args, kwargs = decode(call.payload)
            result = self._invoke(method, args, kwargs)
        except BaseException as error:  # noqa: BLE001 - reported to the engine, which decides
            return _failed(call, error)
        if isinstance(result, AsyncModelRunnerOutput):
            return partial(_result, call, result.get_output)
        return _result(call, lambda: result) if call.wants_result else None

    def _invoke(self, method: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if method == INIT_WORKER:
            return self._init(**kwargs)
        if method == LISTEN:
            return self.worker.listen(self._on_link_failure)
        if self._metrics is not None and args and isinstance(args[0], BudgetedStep):
            self._metrics.budget(args[0].step_budget)
            self._watch_prompts(args[0])
        return run_method(self._wrapper, method, args, kwargs)

    def _init(self, surroundings: Surroundings, **kwargs: Any) -> None:
        # A lock cannot travel; vLLM wants one for a multimodal cache shared between the workers of a machine.
        self._wrapper.init_worker([{**kwargs, "shared_worker_lock": multiprocessing.Lock()}])
        worker = self.worker
        if isinstance(worker, MetalWorker):
            worker.take_place(surroundings)
            self._metrics = StepMetrics(worker.model_config.served_model_name, worker.rank)
            worker.subscribe(self._metrics)
            if worker.rank == 0 and worker.cache_config.enable_prefix_caching:
                self._prompts = PromptMetrics(worker.model_config.served_model_name)

    def _watch_prompts(self, step: BudgetedStep) -> None:
        """Compare the prompts that this step begins with those before them; one that was set back is not among them."""
        if self._prompts is None:
            return
        if self._memory is None:  # vLLM settles the size of a block after it has made the worker
            self._memory = PromptMemory(self.worker.cache_config.block_size)
        for new in step.scheduled_new_reqs:
            if new.prompt_token_ids is not None:
                self._prompts(self._memory.compared(new.prompt_token_ids, new.num_computed_tokens))

    def _on_link_failure(self, error: Exception) -> None:
        self._report(pb.Report(failure=describe(NO_CALL, "handoff", error)))


def _result(call: pb.Call, get: Callable[[], object]) -> pb.Report:
    try:
        return pb.Report(result=pb.Result(seq=call.seq, payload=encode(get())))
    except BaseException as error:  # noqa: BLE001 - reported to the engine, which decides
        return _failed(call, error)


def _failed(call: pb.Call, error: BaseException) -> pb.Report:
    return pb.Report(failure=describe(call.seq, call.method, error))
