"""One Serve replica: an engine of one model (hosting.py), and the HTTP surface that the ingress reaches by handle.

The command line and the ingress import this module, so it imports neither vLLM nor Ray Serve LLM before it runs.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from ray import serve

from pomarium.cluster import faults
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.node.worker_environment import Secrets
from pomarium.cluster.replica import heartbeat, patience
from pomarium.cluster.replica.heartbeat import Alive
from pomarium.cluster.replica.hosting import Hosted, Name, as_text
from pomarium.cluster.replica.loss import EngineFaultError
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.serve_plan import ENDPOINT, ModelPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Accepted:
    """First item of every answer: the request has reached a replica."""


class EngineReplica:
    """Serve deployment class. Deployed once per model, with `plan.replicas` replicas."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, plan: ModelPlan, found: Found, secrets: Secrets
    ) -> None:
        """Start the engine.

        Args:
            found: the checkpoint on the machine that deployed it.
            secrets: for its environment, and that of its workers.

        Raises:
            faults.StartError: with the sentence to show, whichever process failed.
        """
        secrets.enter(os.environ)
        replica = str(serve.get_replica_context().replica_id.unique_id)
        try:
            self._hosted = await Hosted.start(plan, found, Name(replica, ENDPOINT))
        except faults.StartError as error:
            if await asyncio.to_thread(patience.is_up, ENDPOINT):
                reason = faults.marked_sentence(str(error)) or str(error)
                await asyncio.to_thread(patience.start_failed, plan.name, replica, reason)
            raise

    async def request(
        self, method: str, path: str, body: bytes, headers: Sequence[tuple[str, str]]
    ) -> AsyncGenerator[Accepted | Alive | Head | bytes, None]:
        """One HTTP request to vLLM's OpenAI application: `Accepted`, then `Head`, then the body in pieces."""
        yield Accepted()
        answer = heartbeat.beating(self._hosted.answer(method, path, body, headers))
        try:
            with as_text():
                async for item in answer:
                    yield item
        except EngineFaultError:
            logger.exception("%s %s failed", method, path)
            raise
        finally:
            await answer.aclose()

    async def healthy(self) -> str:
        """`ok` if a request would be served now, followed by what is to be said of it, if anything.

        Raises:
            EngineFaultError: if the engine is dead.
        """
        await self.check_health()
        return self._hosted.word()

    async def context(self) -> int:
        """Tokens of prompt and answer together, at most."""
        return self._hosted.context

    async def check_health(self) -> None:
        """Serve's periodic check. Raises EngineFaultError if the engine is dead."""
        await self._hosted.check_health()
