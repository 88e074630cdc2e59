"""One Serve replica: an engine of one model (hosting.py), and the requests that the ingress hands it.

    ingress --request(Routing, ReplyTo), a Serve call--> replica --answering.Line: the request, its answer--> ingress
            <----------------- the call's end ----------'
    ingress --answering.Line: later requests, without a call--> replica, the same way

The command line and the ingress import this module, so it imports neither vLLM nor Ray Serve LLM before it runs.
"""

import asyncio
import os
from dataclasses import dataclass

from ray import serve

from pomarium.cluster import faults
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.node.worker_environment import Secrets
from pomarium.cluster.replica import patience
from pomarium.cluster.replica.answering import Line, LineError, Lines, ReplyTo
from pomarium.cluster.replica.hosting import Hosted, Name, as_text
from pomarium.cluster.replica.loss import EngineLostError
from pomarium.cluster.replica.model_check import Found
from pomarium.cluster.replica.resumed import Resumed
from pomarium.cluster.replica.serve_plan import ENDPOINT, ModelPlan


@dataclass(frozen=True)
class Routing:
    """What the router of the caller's process chooses a replica by; none of it travels.

    Attributes:
        keys: of the prompt (endpoint/routing.py).
    """

    keys: tuple[int, ...] = ()

    def __reduce__(self) -> tuple[type["Routing"], tuple[()]]:
        return Routing, ()


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
        self._lines = Lines(replica, lambda: self._hosted.room())
        try:
            self._hosted = await Hosted.start(plan, found, Name(replica, ENDPOINT))
        except faults.StartError as error:
            if await asyncio.to_thread(patience.is_up, ENDPOINT):
                reason = faults.marked_sentence(str(error)) or str(error)
                await asyncio.to_thread(patience.start_failed, plan.name, replica, reason)
            raise

    async def request(self, _: Routing, reply: ReplyTo) -> None:
        """Answer one HTTP request by vLLM's OpenAI application. Returns when the ingress has the whole answer, or when
        nobody waits for it.

        Raises:
            EngineLostError: the ingress cannot be reached, which the ingress is to tell.
        """
        try:
            await self._lines.serve(reply, self._answer)
        except LineError as error:
            raise EngineLostError(str(error)) from None

    async def _answer(self, asked: Asked, line: Line) -> None:
        with as_text():
            listener = line if asked.seed else None
            if asked.resume is None:
                await self._hosted.answer(asked, line, listener)
                return
            resumed = Resumed(line, asked.resume)
            await self._hosted.answer(asked, resumed, listener)
            resumed.end()

    async def __del__(self) -> None:
        """Serve calls this when it is to end, and waits for graceful_shutdown_timeout_s: requests that came without a
        call are answered."""
        await self._lines.drain()

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
