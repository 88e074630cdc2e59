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

from ray import serve

from pomarium.cluster import faults
from pomarium.cluster.lean_import import import_vllm, without_collections
from pomarium.cluster.rack import reports
from pomarium.cluster.serving import asgi_bridge, heartbeat, ray_llm
from pomarium.cluster.serving.asgi_bridge import Head
from pomarium.cluster.serving.check import Found
from pomarium.cluster.serving.heartbeat import Alive
from pomarium.cluster.serving.plan import ModelPlan
from pomarium.worker import settings
from pomarium.worker.errors import PomariumError
from pomarium.worker.models import embedded

if TYPE_CHECKING:
    from pomarium.cluster.executor.staging import Ask
    from pomarium.cluster.executor.team import Team
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

    async def __init__(self, plan: ModelPlan, found: Found) -> None:  # type: ignore[misc] # Serve awaits it
        """Start the engine. `found`: the checkpoint on the machine that deployed it.

        Raises:
            faults.StartError: with the sentence to show, whichever process failed.
        """
        # Kept, for a process of Ray's ends with the last handle to it.
        self._team, self._server = await _start(plan, found)
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._leave_when_dead(plan.name))]
        if self._team is not None:
            self._tasks.append(loop.create_task(self._report(plan.name, self._team)))
        for task in self._tasks:
            task.add_done_callback(_tell_of_its_end)

    async def _report(self, name: str, team: "Team") -> None:
        from pomarium.cluster.serving.reporting import report

        stages = await self._server.stages(team.members)
        await report(name, _replica_id(), stages[-1].end, stages, self._server.load())

    async def request(
        self, method: str, path: str, body: bytes, headers: Sequence[tuple[str, str]]
    ) -> AsyncGenerator[Accepted | Alive | Head | bytes, None]:
        """One HTTP request to vLLM's OpenAI application: `Accepted`, then `Head`, then the body in pieces."""
        yield Accepted()
        scope = asgi_bridge.scope(method, path, headers)
        answer = heartbeat.beating(asgi_bridge.call(self._server.app, scope, body))
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
                withdrawal = asyncio.create_task(asyncio.to_thread(reports.withdraw, _replica_id()))
                await asyncio.wait({withdrawal}, timeout=FLUSH_S)
                await asyncio.sleep(FLUSH_S)
                os._exit(1)


def _tell_of_its_end(task: "asyncio.Task[None]") -> None:
    """Tasks run as long as the replica: one that fails would do so unseen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("A task of the replica failed.", exc_info=error)


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def ask_of(plan: ModelPlan, found: Found) -> "Ask":
    """What a replica of `plan` wants of the rack."""
    from pomarium.cluster.executor.staging import Ask

    defaults = Ask(plan.source or embedded.NAME)
    return Ask(
        defaults.source,
        found.profiles,
        plan.stages,
        plan.engine_args.get("max_model_len"),
        plan.step_tokens,
        plan.step_requests,
        plan.share_macs,
        plan.streams,
        plan.network or defaults.network,
    )


def _assemble(plan: ModelPlan, found: Found) -> "Team | None":
    """Workers for the engine to come: they import vLLM while the replica does. None where vLLM's own CPU backend
    serves. Blocks while Macs are missing and the endpoint was up before (patience.py)."""
    if not settings.load(os.environ).use_mlx:
        return None
    from pomarium.cluster.executor.team import assemble
    from pomarium.cluster.serving import patience

    ask = ask_of(plan, found)
    return patience.wait_for(lambda: assemble(ask), plan.name, _replica_id())


async def _start(plan: ModelPlan, found: Found) -> "tuple[Team | None, Server]":
    from pomarium.cluster.executor import handover

    team: Team | None = None
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="pomarium-"))
        fault_file = Path(scratch) / "fault.json"
        os.environ[faults.FILE_VARIABLE] = str(fault_file)
        stack.callback(os.environ.pop, faults.FILE_VARIABLE)
        try:
            assembly = asyncio.get_running_loop().run_in_executor(None, _assemble, plan, found)
            with without_collections():
                if settings.load(os.environ).use_mlx:
                    import_vllm()
                ray_llm.import_registry()
                from pomarium.cluster.serving.llm_server import Server

            team = await assembly
            folder = _here(plan, found)
            if team is None:
                return None, await Server.start(plan, folder, 1, None)
            stack.enter_context(handover.offer(team.members, os.environ))
            return team, await Server.start(plan, folder, len(team.members), team.reservation.group)
        except Exception as error:
            logger.exception("The engine of %s did not start.", plan.name)
            if team is not None:
                team.dissolve()
            raise faults.StartError(faults.recorded_sentence(fault_file) or faults.sentence(error)) from None


def _here(plan: ModelPlan, found: Found) -> Path:
    """The checkpoint on this machine, which may be another than the one that deployed it. Raises CheckpointError."""
    if found.folder.is_dir():
        return found.folder
    from pomarium.worker.models.resolve import resolve

    values = settings.load(os.environ)
    return resolve(plan.source, use_modelscope=values.use_modelscope, modelscope_cache=values.modelscope_cache)
