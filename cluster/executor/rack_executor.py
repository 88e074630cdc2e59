"""RackExecutor: vLLM's Executor over one Ray actor per pipeline stage and a link to each.

    EngineCore --execute_model, sample_tokens--> RackExecutor --Call--> every worker, in one order
               <--Future of the last stage------              <-Report-

Ray places, starts and ends the workers and is in no step's path. `execute_model` goes to every stage; the last one
answers `sample_tokens`, the others `execute_model` with the time that they took, and the slowest's goes with the tokens
to the scheduler. A step may take whatever it takes: a worker that answers pings is not lost, and how long it has been
computing is in the replica's /health and metrics. Any failure fails every pending Future first and then calls the
engine's callback, so no thread is left waiting. Stages are told their layers and rank before they load
(`member.surroundings`), then each other's addresses; what they hand on never passes through here.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.abstract import Executor, FailureCallback
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from pomarium.cluster.executor.ask import ask_of
from pomarium.cluster.executor.codec import WorkerError, WorkerLostError, encode_call, method_name
from pomarium.cluster.executor.handover import offered
from pomarium.cluster.executor.host import INIT_WORKER, LISTEN
from pomarium.cluster.executor.launch import RemoteWorker, connect
from pomarium.cluster.executor.link import Reply, gather
from pomarium.cluster.executor.member import Member, surroundings
from pomarium.cluster.executor.parcel import for_workers
from pomarium.cluster.executor.ray_connection import ensure_connected
from pomarium.cluster.executor.team import Team, assemble
from pomarium.cluster.executor.timed import slower
from pomarium.cluster.faults import record_engine_core_faults, record_loss
from pomarium.worker.errors import PomariumError
from pomarium.worker.pipeline.place import Surroundings
from pomarium.worker.settings import step_timeout

logger = init_logger("vllm.pomarium.executor")

START_TIMEOUT_S = 240.0
"""Imports of vLLM, torch and MLX, and the device."""
CALL_TIMEOUT_S = 3600.0
"""Any other call whose caller names no time: loading weights may include a download. A bound, not an expectation: a
worker that is lost or frozen is seen within seconds."""
SHUTDOWN_TIMEOUT_S = 5.0


class RackExecutor(Executor):
    """See the module. Set by `platform.PomariumPlatform`, or by its qualified name as distributed_executor_backend.

    Attributes:
        workers: the started workers in rank order: Mac, layers, address, device.
    """

    uses_ray = True
    supports_pp = True

    workers: tuple[RemoteWorker, ...]

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        return True

    def _init_executor(self) -> None:
        record_engine_core_faults()
        self.workers = ()
        self._team: Team | None = None
        self._order = threading.Lock()
        self._state = threading.Lock()
        self._failure: Exception | None = None
        self._failure_callbacks: list[FailureCallback] = []
        self._closed = False
        self._step_timeout_s = step_timeout(os.environ)
        self._relayed: deque[list[Reply]] = deque()
        try:
            members = offered(os.environ, self.parallel_config.world_size) or self._assemble()
            self.workers = connect(members, self._on_worker_failure)
            self._init_workers(surroundings(members))
            self.collective_rpc("init_device", timeout=START_TIMEOUT_S)
            self.collective_rpc("load_model")
            if len(self.workers) > 1:
                addresses = self.collective_rpc(LISTEN, timeout=START_TIMEOUT_S)
                self.collective_rpc("connect", timeout=START_TIMEOUT_S, args=(addresses,))
        except BaseException:
            self.shutdown()
            raise

    def _assemble(self) -> tuple[Member, ...]:
        ensure_connected(self.parallel_config.world_size)
        self._team = assemble(ask_of(self.vllm_config), self.parallel_config.placement_group)
        return self._team.members

    def _init_workers(self, surroundings: Sequence[Surroundings]) -> None:
        replies = []
        for worker in self.workers:
            kwargs = {
                "vllm_config": self.vllm_config,
                "local_rank": worker.local_rank,
                "rank": worker.rank,
                "distributed_init_method": "",
                "is_driver_worker": worker.rank == 0,
                "surroundings": surroundings[worker.rank],
            }
            payload = encode_call(INIT_WORKER, (), kwargs)
            replies.append(worker.link.call(INIT_WORKER, payload, START_TIMEOUT_S))
        for reply in replies:
            reply.result()
        for worker in self.workers:
            member, endpoint = worker.member, worker.member.contact.endpoint
            part = "the whole model" if member.layers is None else f"layers {member.layers[0]}-{member.layers[1] - 1}"
            logger.info("Worker %d: %s, %s pid %d: %s", worker.rank, member.mac, endpoint.address, endpoint.pid, part)

    def execute_model(
        self, scheduler_output: SchedulerOutput, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput | None] | None:
        """Sends the step to every stage; None (or a Future of it): the tokens come with `sample_tokens`."""
        payload = encode_call("execute_model", (for_workers(scheduler_output),))
        sampled = bool(scheduler_output.total_num_scheduled_tokens)
        with self._order:
            *relays, last = (worker.link for worker in self.workers)
            told = [link.call("execute_model", payload, self._step_timeout_s, fatal=True) for link in relays]
            last.post("execute_model", payload)
            if sampled:
                self._relayed.append(told)
        output = None if sampled else EMPTY_MODEL_RUNNER_OUTPUT
        if not non_block:
            return output
        future: Future[ModelRunnerOutput | None] = Future()
        future.set_result(output)
        return future

    def sample_tokens(
        self, grammar_output: GrammarOutput | None, non_block: bool = False
    ) -> ModelRunnerOutput | Future[ModelRunnerOutput]:
        """Tokens of the oldest step that was not sampled, from the last stage."""
        payload = encode_call("sample_tokens", (grammar_output,))
        with self._order:
            told = self._relayed.popleft()
            reply = self.workers[-1].link.call("sample_tokens", payload, self._step_timeout_s, fatal=True)
        if told:
            reply = reply.then(partial(_slowest, told))
        if non_block:
            return reply
        output: ModelRunnerOutput = reply.result()
        return output

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> list[Any] | Future[list[Any]]:
        """Call `method` on every worker; results in rank order.

        Raises what a worker raised (PomariumError as it was, else WorkerError), WorkerLostError, or TimeoutError after
        `timeout` (CALL_TIMEOUT_S by default).
        """
        limit = CALL_TIMEOUT_S if timeout is None else timeout
        name = method_name(method)
        payload = encode_call(method, args, kwargs)
        with self._order:
            replies = [worker.link.call(name, payload, limit) for worker in self.workers]
        return gather(replies) if non_block else [reply.result() for reply in replies]

    def register_failure_callback(self, callback: FailureCallback) -> None:
        with self._state:
            self._failure_callbacks.append(callback)
            failed = self._failure is not None
        if failed:
            callback()

    def check_health(self) -> None:
        """Raises what the executor failed with. Links are watched all the time, so there is nothing to ask for."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise WorkerLostError("the executor was shut down")

    def shutdown(self) -> None:
        """End workers and give back what was reserved. May be called again, and after a failure."""
        if self._closed:
            return
        self._closed = True
        if self._failure is None:
            self._say_goodbye()
        for worker in self.workers:
            worker.link.close()
        if self._team is not None:
            self._team.dissolve()

    def _say_goodbye(self) -> None:
        payload = encode_call("shutdown")
        try:
            for reply in [w.link.call("shutdown", payload, SHUTDOWN_TIMEOUT_S) for w in self.workers]:
                reply.result()
        except (WorkerLostError, WorkerError, PomariumError, TimeoutError) as error:
            logger.warning("A worker did not shut down in order: %s", error)

    def _on_worker_failure(self, rank: int, error: Exception) -> None:
        with self._state:
            if self._failure is not None or self._closed:
                return
            self._failure = error
            callbacks = list(self._failure_callbacks)
        record_loss(error, rank if isinstance(error, WorkerLostError) else None)
        logger.error("%s", error)
        for worker in self.workers:
            if worker.rank != rank:
                worker.link.fail(error)
        for callback in callbacks:
            callback()


def _slowest(relayed: Sequence[Reply], output: ModelRunnerOutput) -> ModelRunnerOutput:
    """The last stage's output with the time of the slowest stage, of those whose answers have come before it."""
    done = [reply for reply in relayed if reply.done() and reply.exception() is None]
    return slower(output, [told for reply in done if (told := reply.result()) is not None])
