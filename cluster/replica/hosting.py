"""An engine in this process: its workers placed and started, itself started over them, watched, and asked over HTTP.

    ModelPlan, Found --Hosted.start: patience, executor.team, llm_server--> Hosted --answer--> head, pieces
                                                                                `--the engine dies--> the process ends

What Serve's replicas (replica.py) and the actors of batch jobs (batch/actor.py) have in common. The process ends with
its engine, so that whoever started it sees the loss and starts another, which plans anew. The command line imports this
module, so it imports neither vLLM nor Ray Serve LLM before it runs.
"""

import asyncio
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import ray

from pomarium.cluster import faults
from pomarium.cluster.executor.lean_import import import_vllm, without_collections
from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.http.asgi_bridge import Exchange
from pomarium.cluster.http.progress import Listener
from pomarium.cluster.http.room import Room
from pomarium.cluster.machine import disk
from pomarium.cluster.node.ray_folder import session_folder
from pomarium.cluster.rack import reports
from pomarium.cluster.rack.reports import LossReport
from pomarium.cluster.replica import kept_logging, loss, parsers, ray_llm, step_watch
from pomarium.cluster.replica.departure import Departure
from pomarium.cluster.replica.loss import EngineFaultError, EngineGoneError, EngineLostError
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.serve_plan import ModelPlan
from pomarium.cluster.replica.slots import Slots
from pomarium.cluster.replica.step_watch import StepWatch
from pomarium.worker import settings
from pomarium.worker.errors import PomariumError
from pomarium.worker.models import embedded

if TYPE_CHECKING:
    from pomarium.cluster.executor.staging import Ask
    from pomarium.cluster.executor.team import Team
    from pomarium.cluster.replica.llm_server import Server

logger = logging.getLogger(__name__)

WATCH_S = 0.25
"""How often it is looked whether the engine lives, and how long its step has been running."""

CAUSE_S = 1.0
CAUSE_LOOK_S = 0.05
"""For how long it is looked for what a dead engine died of, and how often."""
CAUSE_UNKNOWN = "the log says of what"

FLUSH_S = 0.5
"""What a process with a dead engine, or one that is to end, leaves to its requests, to answer with an error."""


@contextmanager
def as_text() -> Iterator[None]:
    """No exception of vLLM leaves the process: to unpickle one means to import vLLM, and an ingress or a controller of
    Serve that does so answers nobody for ten seconds and more."""
    try:
        yield
    except EngineFaultError:
        raise
    except Exception as error:
        raise EngineFaultError(faults.sentence(error)) from error


@dataclass(frozen=True)
class Name:
    """Whose engine it is.

    Attributes:
        replica: unique, as `rack status` shows it. group: what it belongs to, the endpoint or a job (see patience.py).
    """

    replica: str
    group: str


class Hosted:
    """A running engine. Made by `start`."""

    def __init__(self, plan: ModelPlan, replica: str, team: "Team | None", server: "Server", fault_file: Path) -> None:
        # The team is kept, for a process of Ray's ends with the last handle to it.
        self._plan, self._replica, self._team, self._server = plan, replica, team, server
        self._fault_file = fault_file
        self._cause: asyncio.Task[str] | None = None
        self._steps = StepWatch(settings.load(os.environ).step_seconds)
        # Serve starts another engine where one has more than its load.
        self._slots = Slots(plan.step_requests, 1 if plan.scaling is None else math.ceil(2 * plan.scaling.load))
        self._load = server.load(self._steps, self._slots)
        loop = asyncio.get_running_loop()
        here = ray.get_runtime_context().get_node_id()
        self._departure = Departure(replica, (here, *(() if team is None else team.reservation.nodes)))
        self._tasks = [
            loop.create_task(self._leave_when_dead()),
            loop.create_task(self._leave_when_drained()),
            loop.create_task(self._watch_steps()),
        ]
        if team is not None:
            self._tasks.append(loop.create_task(self._report(team)))
        for task in self._tasks:
            task.add_done_callback(_tell_of_its_end)

    @classmethod
    async def start(cls, plan: ModelPlan, found: Found, name: Name) -> "Hosted":
        """Start an engine of `plan`.

        Args:
            found: the checkpoint on the machine that deployed it.

        Raises:
            faults.StartError: with the sentence to show, whichever process failed.
        """
        kept_logging.install()
        try:
            disk.require(session_folder())
            fault_file = Path(tempfile.mkdtemp(prefix="engine-", dir=session_folder())) / "fault.json"
        except (PomariumError, OSError) as error:
            raise faults.StartError(faults.sentence(error)) from None
        try:
            team, server = await _start(plan, found, name, fault_file)
        except BaseException:
            shutil.rmtree(fault_file.parent, ignore_errors=True)
            raise
        return cls(plan, name.replica, team, server, fault_file)

    async def answer(self, asked: Asked, exchange: Exchange, listener: Listener | None = None) -> None:
        """Have vLLM's OpenAI application answer one HTTP request.

        Args:
            listener: is told what the answer's tokens are, so that another engine could go on with it.

        Raises:
            EngineGoneError: the engine was dead before the request came, or is to end.
            EngineMovedError: it ends, and leaves the answer to another one.
            EngineLostError: the engine is dead, before the answer was whole.
            Exception: what the application raises.
        """
        try:
            await self.check_health()
        except EngineLostError as lost:
            raise EngineGoneError(str(lost)) from None
        honest = loss.Honest(exchange, self.check_health)
        scope = asgi_bridge.scope(asked.method, asked.path, asked.headers)
        try:
            with nullcontext() if listener is None else self._server.telling(asked, listener):
                await self._departure.attended(asgi_bridge.run(self._server.app, scope, honest))
        except EngineLostError:
            raise
        except Exception:
            await self.check_health()
            raise
        honest.raise_loss()

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._server.context

    async def check_health(self) -> None:
        """Raises EngineLostError if the engine is dead."""
        try:
            await self._server.check_health()
        except Exception as error:
            if self._cause is None:
                self._cause = asyncio.create_task(asyncio.to_thread(self._find_cause))
            found, _ = await asyncio.wait({self._cause}, timeout=2 * CAUSE_S)  # Ray's head may be gone as well
            known = bool(found) and self._cause.exception() is None
            raise EngineLostError(self._cause.result() if known else CAUSE_UNKNOWN) from error

    def _find_cause(self) -> str:
        """What the engine died of, a clause. Takes CAUSE_S at most."""
        from pomarium.cluster.executor import team

        deadline, members = time.monotonic() + CAUSE_S, self._team

        def worker_end(rank: int) -> str | None:
            return None if members is None else team.end_of(members, rank, deadline)

        while True:
            recorded, code = faults.recorded_loss(self._fault_file), self._server.exit_code()
            if recorded is not None or code is not None or time.monotonic() > deadline:
                return loss.cause(recorded, code, worker_end)
            time.sleep(CAUSE_LOOK_S)

    def room(self) -> Room:
        """What it has room for now."""
        return Room(self._slots.count, self._server.cache_tokens)

    def word(self) -> str:
        """How a living engine does: `ok`, and what is to be said of its steps, if anything."""
        if self._departure.drain is not None:  # others take what comes (rack/drain_check.py)
            return f"{step_watch.OK}, but {self._departure.drain.reason}"
        return self._steps.word(time.monotonic())

    async def _watch_steps(self) -> None:
        from pomarium.cluster.executor.step_metrics import StepRunning

        gauge = StepRunning(self._plan.name, self._replica)
        while True:
            now = time.monotonic()
            self._steps.look(now, self._server.busy())
            gauge.set(self._steps.running_s(now))
            await asyncio.sleep(WATCH_S)

    async def _report(self, team: "Team") -> None:
        from pomarium.cluster.replica.reporting import Engine, links_of, report

        stages = await self._server.stages(team.members)
        links = links_of(stages, self._plan.network)
        least = 1 if self._plan.share_macs or self._plan.stages is None else self._plan.stages
        await report(Engine(self._plan.name, self._replica, stages[-1].end, stages, links, least), self._load)

    async def _leave_when_dead(self) -> None:
        """End the process once the engine is dead: a lost one is replaced at once, an unhealthy one later."""
        while True:
            await asyncio.sleep(WATCH_S)
            try:
                await self.check_health()
            except EngineLostError as lost:
                logger.exception(
                    "The engine of %s is dead; its process ends, so that another is started.", self._plan.name
                )
                await self._end_process(str(lost))

    async def _leave_when_drained(self) -> None:
        """End the process once a Mac that it runs on is to be let go."""
        drain = await self._departure.due()
        logger.warning("%s: the engine of %s ends; another is started elsewhere.", drain.reason, self._plan.name)
        await self._end_process(drain.reason)

    async def _end_process(self, reason: str) -> None:
        telling = asyncio.create_task(asyncio.to_thread(self._tell_of_the_loss, reason))
        await asyncio.wait({telling}, timeout=FLUSH_S)
        await asyncio.sleep(FLUSH_S)
        shutil.rmtree(self._fault_file.parent, ignore_errors=True)
        os._exit(1)

    def _tell_of_the_loss(self, reason: str) -> None:
        reports.publish_loss(LossReport(self._plan.name, self._replica, reason, time.time()))
        reports.withdraw(self._replica)


def _tell_of_its_end(task: "asyncio.Task[None]") -> None:
    """Tasks run as long as the process: one that fails would do so unseen."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("A task of the engine's process failed.", exc_info=error)


def ask_of(plan: ModelPlan, found: Found) -> "Ask":
    """What an engine of `plan` wants of the rack."""
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


def _assemble(plan: ModelPlan, found: Found, name: Name) -> "Team | None":
    """Workers for the engine to come: they import vLLM while this process does. None where vLLM's own CPU backend
    serves. Blocks while Macs are missing and the group was up before (patience.py)."""
    if not settings.load(os.environ).use_mlx:
        return None
    from pomarium.cluster.executor.team import assemble
    from pomarium.cluster.replica import patience

    ask = ask_of(plan, found)
    return patience.wait_for(
        lambda say: assemble(ask, owner=name.replica, say=say), plan.name, name.replica, name.group
    )


async def _start(plan: ModelPlan, found: Found, name: Name, fault_file: Path) -> "tuple[Team | None, Server]":
    """fault_file: where the engine's processes leave what they end of."""
    from pomarium.cluster.executor import handover

    team: Team | None = None
    with ExitStack() as stack:
        os.environ[faults.FILE_VARIABLE] = str(fault_file)
        stack.callback(os.environ.pop, faults.FILE_VARIABLE)
        try:
            assembly = asyncio.get_running_loop().run_in_executor(None, _assemble, plan, found, name)
            with without_collections():
                if settings.load(os.environ).use_mlx:
                    import_vllm()
                ray_llm.import_registry()
                from pomarium.cluster.replica.llm_server import Server

            team = await assembly
            folder = _here(plan, found)
            plan = _with_parsers(plan, found)
            if team is None:
                return None, await Server.start(plan, folder, 1, None)
            stack.enter_context(handover.offer(team.members, os.environ))
            return team, await Server.start(plan, folder, len(team.members), team.reservation.group)
        except Exception as error:
            logger.exception("The engine of %s did not start.", plan.name)
            if team is not None:
                team.dissolve()
            raise faults.StartError(faults.recorded_sentence(fault_file) or faults.sentence(error)) from None


def _with_parsers(plan: ModelPlan, found: Found) -> ModelPlan:
    """The plan with what reads the model's answers among its engine arguments."""
    chosen = parsers.in_force(found.parsers, plan.engine_args)
    logger.info("%s: %s; %s.", plan.name, chosen, parsers.HINT)
    return replace(plan, engine_args=parsers.arguments(chosen, plan.engine_args))


def _here(plan: ModelPlan, found: Found) -> Path:
    """The checkpoint on this machine, which may be another than the one that deployed it. Raises CheckpointError."""
    if found.folder.is_dir():
        return found.folder
    from pomarium.worker.models.resolve import resolve

    values = settings.load(os.environ)
    return resolve(plan.source, use_modelscope=values.use_modelscope, modelscope_cache=values.modelscope_cache)
