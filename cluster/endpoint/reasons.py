"""Why a model is not served: what a replica that waits for Macs tells, else Serve's last message about the deployment.

    rack.reports, serve_actors, Serve's controller --in a thread, one at a time--> {deployment: State} --explain-->
    one sentence

The message about a replica that could not start quotes its StartError, hence the sentence that says what is missing.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from pomarium.cluster import faults
from pomarium.cluster.endpoint import watch
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.node.ray_names import deployment_name

READ_S = 0.5
"""How long a caller waits for the controller."""

FRESH_S = 1.0
"""How long an answer of the controller is used again."""

LONGEST = 300
"""Characters of a message of Serve's that are shown."""

RUNNING = "RUNNING"
"""Serve's name for a replica that serves."""

UNKNOWN = "no engine answers; it is starting or being replaced"
LOST = "its engine was lost"
ANOTHER = "another is being started"

LOST_S = 600.0
"""For how long a loss is told while no engine runs."""

SERVE_SAYS_LOST = "A replica's health check failed."
"""Serve's message about any lost replica; it goes on to tell to deploy again, for which there is no need."""


def explain(state: State, otherwise: str) -> str:
    """What is known of a deployment comes down to: our own sentence in Serve's message, what its engine was lost of,
    else Serve's words; `otherwise` if there are none."""
    if sentence := faults.marked_sentence(state.message):
        return sentence
    if state.lost:
        return f"{LOST} ({state.lost}); {ANOTHER}"
    line = faults.one_line(state.message)
    if line.startswith(SERVE_SAYS_LOST):
        return f"{LOST}; {ANOTHER}"
    if not line:
        return otherwise
    return f"no engine answers; Serve says: {line[:LONGEST]}{'...' if len(line) > LONGEST else ''}"


def states() -> Mapping[str, State]:
    """What is known of each deployment of all applications. Blocks until controller and head answer."""
    from ray import serve

    from pomarium.cluster.rack import reports, serve_actors

    applications = serve.status().applications.values()
    actors, losses, since = serve_actors.read(), reports.read_losses(), time.time() - LOST_S
    found = {
        name: State(
            status.message,
            status.replica_states.get(RUNNING, 0),
            lost=watch.loss_of(name, actors, losses, since),
            there=sum(status.replica_states.values()),
        )
        for app in applications
        for name, status in app.deployments.items()
    }
    for told in reports.read_waiting():
        name = deployment_name(told.model)
        known = found.get(name, State())
        if not known.waking:
            sentence = str(faults.StartError(told.reason))
            found[name] = replace(known, message=sentence, waiting=True, waking=told.waking)
    return found


class Reasons:
    """Answers `why` within READ_S, whatever becomes of controller and head: at most one thread waits for them."""

    def __init__(self, read: Callable[[], Mapping[str, State]] = states) -> None:
        self._read = read
        self._known: Mapping[str, State] = {}
        self._known_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    async def why(self, deployment: str, otherwise: str = UNKNOWN) -> str:
        """One sentence on why no replica of `deployment` serves; `otherwise` if the controller has nothing to say."""
        return explain(await self.state(deployment), otherwise)

    async def state(self, deployment: str) -> State:
        """What is known of `deployment`; an empty State if nothing is."""
        if time.monotonic() - self._known_at > FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._refresh())
            await asyncio.wait({self._reading}, timeout=READ_S)
        return self._known.get(deployment, State())

    async def _refresh(self) -> None:
        self._known = await asyncio.to_thread(self._read)
        self._known_at = time.monotonic()
