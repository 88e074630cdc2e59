"""vLLM's engine with a model in stages, in the process of the test: each stage's worker on a thread of its own.

    staged(directory, bounds) --> vllm.LLM, over RackExecutor, control streams and handoff links as on a rack

Everything but Ray and the processes is real: the executor adopts the workers as it adopts those that a replica started
ahead (executor.handover), and they reach each other on loopback. An engine takes about a second, where
processes take ten.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engine_process import engine
from vllm import LLM

from pomarium.cluster.executor.actor import Endpoint
from pomarium.cluster.executor.handover import offer
from pomarium.cluster.executor.host import WorkerHost
from pomarium.cluster.executor.member import Contact, Member
from pomarium.cluster.executor.service import ControlService, serve
from pomarium.cluster.node.worker_environment import HANDED_OVER
from pomarium.worker.handoff.errors import LinkClosedError

TOKEN = "the token of a test"


class StageThread:
    """One stage's worker: what WorkerActor is in a process of its own.

    Attributes:
        host: vLLM's worker within. contact: for the engine.
    """

    def __init__(self, rank: int) -> None:
        self.host = WorkerHost(rank)
        self._service = ControlService(TOKEN, on_end=lambda: self._service.calls.put(None))
        self._server, address = serve(self._service, "127.0.0.1")
        self.contact = Contact(Endpoint(address, 0, "node"), TOKEN)
        self._thread = threading.Thread(target=self.host.run, args=(self._service.calls, self._service.report))
        self._thread.daemon = True
        self._thread.start()

    def end(self) -> None:
        """A process would just end; a thread that waits for a neighbour has to be told."""
        over = LinkClosedError("the engine is over")
        if (stage := self.host.worker._stage) is not None:  # None if its model was refused
            for outbox in (stage.links._next, stage.links._first):
                if outbox is not None:
                    outbox.fail(over)
            stage.links._server.fail(over)
        self._service.calls.put(None)
        self._thread.join(30)
        self._server.stop(0).wait(5)


@contextmanager
def staged(
    model: Path, bounds: Sequence[int], environment: Mapping[str, str] | None = None, **arguments: Any
) -> Iterator[tuple[LLM, list[StageThread]]]:
    """As `engine_process.engine`, with the layers cut at `bounds` (the first is 0, the last their number)."""
    stages = [StageThread(rank) for rank in range(len(bounds) - 1)]
    members = [
        Member(stage.contact, f"mac-{rank}", str(model), cut)
        for rank, (stage, cut) in enumerate(zip(stages, pairwise(bounds), strict=True))
    ]
    variables: dict[str, str] = {}
    try:
        with (
            offer(members, variables),
            patch.dict("os.environ", {HANDED_OVER: variables[HANDED_OVER]}),
            engine(model, environment, pipeline_parallel_size=len(stages), **arguments) as llm,
        ):
            yield llm, stages
    finally:
        for stage in stages:
            stage.end()
