"""One Serve replica: an engine of one model, its workers, and the HTTP surface that the ingress reaches by handle.

The command line and the ingress import this module, so it imports neither vLLM nor Ray Serve LLM before it runs.
"""

import asyncio
import logging
import os
import tempfile
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pomarium.cluster import faults
from pomarium.cluster.lean_import import import_vllm, without_collections
from pomarium.cluster.serving import asgi_bridge
from pomarium.cluster.serving.asgi_bridge import Head
from pomarium.cluster.serving.plan import ModelPlan
from pomarium.worker import settings
from pomarium.worker.errors import PomariumError

if TYPE_CHECKING:
    from pomarium.cluster.executor.launch import WorkerProcess
    from pomarium.cluster.serving.llm_server import Server

logger = logging.getLogger(__name__)

WATCH_S = 0.25
"""How often a replica looks whether its engine lives."""

FLUSH_S = 0.5
"""What a replica with a dead engine leaves to its running requests, to answer with an error."""


@dataclass(frozen=True)
class Accepted:
    """First item of every answer: the request has reached a replica."""


class EngineFaultError(PomariumError):
    """What an engine raised, as text."""


@contextmanager
def _as_text() -> Iterator[None]:
    """No exception of vLLM leaves the replica: to unpickle one means to import vLLM, and an ingress or a controller of
    Serve that does so answers nobody for ten seconds and more."""
    try:
        yield
    except Exception as error:
        raise EngineFaultError(faults.sentence(error)) from error


class EngineReplica:
    """Serve deployment class. Deployed once per model, with `plan.replicas` replicas."""

    async def __init__(self, plan: ModelPlan, folder: Path) -> None:  # type: ignore[misc] # Serve awaits it
        """Start the engine. `folder`: the checkpoint, readable on every machine that runs a worker.

        Raises:
            faults.StartError: with the sentence to show, whichever process failed.
        """
        # Kept, for a process of Ray's ends with the last handle to it.
        self._workers, self._server = await _start(plan, folder)
        self._watch = asyncio.get_running_loop().create_task(self._leave_when_dead(plan.name))

    async def request(
        self, method: str, path: str, body: bytes, headers: Sequence[tuple[str, str]]
    ) -> AsyncGenerator[Accepted | Head | bytes, None]:
        """One HTTP request to vLLM's OpenAI application: `Accepted`, then `Head`, then the body in pieces."""
        yield Accepted()
        scope = asgi_bridge.scope(method, path, headers)
        answer = asgi_bridge.call(self._server.app, scope, body)
        try:
            with _as_text():
                async for item in answer:
                    yield item
        except EngineFaultError:
            logger.exception("%s %s failed", method, path)
            raise
        finally:
            await answer.aclose()

    async def healthy(self) -> bool:
        """True if a request would be served now.

        Raises:
            EngineFaultError: if the engine is dead.
        """
        await self.check_health()
        return True

    async def check_health(self) -> None:
        """Serve's periodic check. Raises EngineFaultError if the engine is dead."""
        with _as_text():
            await self._server.check_health()

    async def _leave_when_dead(self, name: str) -> None:
        """End the process once the engine is dead: Serve replaces a lost replica at once, an unhealthy one later."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.check_health()
            except EngineFaultError:
                logger.exception("The engine of %s is dead; this replica leaves, so that Serve starts another.", name)
                await asyncio.sleep(FLUSH_S)
                os._exit(1)


def _start_workers(plan: ModelPlan) -> "tuple[WorkerProcess, ...]":
    """Worker processes for the engine to come, on this replica's placement group: they import vLLM while the replica
    does. None where vLLM's own CPU backend serves."""
    if not settings.load(os.environ).use_mlx:
        return ()
    from pomarium.cluster.executor import bundles, launch

    return launch.start(bundles.reserve(None, plan.stages))


async def _start(plan: ModelPlan, folder: Path) -> "tuple[tuple[WorkerProcess, ...], Server]":
    from pomarium.cluster.executor import handover, launch

    workers: tuple[WorkerProcess, ...] = ()
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="pomarium-"))
        fault_file = Path(scratch) / "fault.json"
        os.environ[faults.FILE_VARIABLE] = str(fault_file)
        stack.callback(os.environ.pop, faults.FILE_VARIABLE)
        try:
            workers = _start_workers(plan)
            with without_collections():
                if workers:
                    import_vllm()
                from pomarium.cluster.serving.llm_server import Server

            if workers:
                stack.enter_context(handover.offer(await asyncio.to_thread(launch.contacts, workers), os.environ))
            return workers, await Server.start(plan, folder)
        except Exception as error:
            logger.exception("The engine of %s did not start.", plan.name)
            launch.kill(workers)
            raise faults.StartError(faults.recorded_sentence(fault_file) or faults.sentence(error)) from None
