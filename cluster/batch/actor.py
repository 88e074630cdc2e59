"""Engines of a batch job: Ray actors, each with its own workers on the rack, in stages where the plan says so.

    RayEngine (driver) --start, answer--> EngineActor (Ray places it) --serving.hosting--> workers on Macs
         ^------------- the actor is lost: another one is made, which plans on the Macs that are left

An actor's process ends with its engine, so there is one kind of loss, whatever died. Actors end with their job.
"""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from pomarium.cluster import faults
from pomarium.cluster.batch.dispatch import EngineLostError
from pomarium.cluster.batch.lines import Answer, Request, answer_of
from pomarium.cluster.executor import bundles
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.http.asgi_bridge import Collected
from pomarium.cluster.node.worker_environment import Secrets, parted
from pomarium.cluster.replica import loss, patience
from pomarium.cluster.replica.hosting import Hosted, Name, as_text
from pomarium.cluster.replica.loss import EngineFaultError
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.serve_plan import REPLICA_CPUS, ModelPlan
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

HEADERS = (("content-type", "application/json"),)
STARTS = 5
"""Attempts to start an engine whose machine is lost meanwhile."""


class EngineStartError(PomariumError):
    """An engine of the job did not start; says why."""


class EngineActor:
    """What runs in the actor's process."""

    def __init__(self, plan: ModelPlan, found: Found, name: Name, secrets: Secrets) -> None:
        secrets.enter(os.environ)
        self._plan, self._found, self._name = plan, found, name

    async def start(self) -> None:
        """Start the engine. Raises faults.StartError."""
        self._hosted = await Hosted.start(self._plan, self._found, self._name)

    async def answer(self, url: str, body: bytes) -> tuple[int, bytes]:
        """Status and body.

        Raises:
            loss.EngineLostError: the engine is dead, or leaves its Mac, which is drained.
        """
        collected = Collected(body)
        try:
            with as_text():
                await self._hosted.answer(Asked("POST", url, HEADERS), collected)
        except loss.EngineLostError:
            raise
        except EngineFaultError as error:
            await self._hosted.check_health()
            logger.exception("A request failed.")
            return 500, json.dumps({"error": {"message": str(error), "type": "server_error", "code": 500}}).encode()
        return collected.status, collected.answer


class RayEngine:
    """A dispatch.Engine in an actor.

    Attributes:
        room: as many requests as fit into a step of the engine, and half as many that wait there.
    """

    def __init__(self, plan: ModelPlan, found: Found, job: str, index: int, environment: Mapping[str, str]) -> None:
        """`environment`: variables that the actor gets beside its node's."""
        self.room = plan.step_requests * 3 // 2
        self._variables, self._secrets = parted(environment)
        self._plan, self._found = plan, found
        self._name = Name(f"{job}#{index}", job)
        self._actor: Any = None

    async def start(self) -> None:
        """See dispatch.Engine. Raises EngineStartError."""
        options: dict[str, Any] = {"num_cpus": REPLICA_CPUS, "max_restarts": 0, "max_concurrency": self.room + 8}
        if self._variables:
            options["runtime_env"] = {"env_vars": self._variables}
        for _ in range(STARTS):
            if self._actor is not None:
                ray.kill(self._actor)
                bundles.release_of(self._name.replica)
            made = ray.remote(EngineActor).options(**options)
            self._actor = made.remote(self._plan, self._found, self._name, self._secrets)
            try:
                await self._actor.start.remote()
            except RayActorError as error:
                logger.warning("An engine was lost while it started: %s", error)
                continue
            except faults.StartError as error:
                raise EngineStartError(faults.marked_sentence(str(error)) or faults.one_line(str(error))) from None
            patience.came_up(self._name.group)
            return
        raise EngineStartError(f"{STARTS} engines in a row were lost while they started; the log says how.")

    async def answer(self, request: Request) -> Answer:
        """See dispatch.Engine."""
        try:
            status, body = await self._actor.answer.remote(request.url, request.body)
        except (RayActorError, EngineFaultError) as error:
            raise EngineLostError(faults.one_line(str(error))[:300]) from None
        return answer_of(status, body)
