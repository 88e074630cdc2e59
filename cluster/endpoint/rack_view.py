"""What `GET /v1/rack` tells, and the page shows: the document of `rack status --json`, and the state of each model.

    rack.look, in a thread, one at a time --RackView.status--> RackStatus --+--document--> JSON object
    reasons.Reasons: what Serve says of each model ------model_state--------'

However many look, each ingress asks the rack's head once a second at most, and not at all while nobody looks. It keeps
nothing that another would lack.
"""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.exceptions import RayError, RpcError

from pomarium.cluster import faults
from pomarium.cluster.endpoint import reasons
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.http import openai_errors
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.node.ray_folder import session_folder
from pomarium.cluster.rack import current, look, roster, status
from pomarium.cluster.rack.status import RackStatus
from pomarium.worker.errors import PomariumError

logger = logging.getLogger(__name__)

FRESH_S = 1.0
"""For how long a reading is shared."""
WAIT_S = 4.0
"""How long who asks waits for the rack's head."""

SILENT = "Ray's head does not answer, so nothing is known of the rack now."

SERVING, STARTING, ASLEEP, WAKING, WAITING, FAILED, LOST, LEAVING = (
    "serving",
    "starting",
    "asleep",
    "waking",
    "waiting",
    "failed",
    "lost",
    "leaving",
)
"""States of a model."""


@dataclass(frozen=True)
class ModelState:
    """A model of the endpoint.

    Attributes:
        name: in requests. state: SERVING if it has an engine, else why it has none: one is STARTING, it is ASLEEP for
            nobody asks, Macs are WAKING for it, it is WAITING for Macs, its start FAILED, or the engine was LOST. On
            demand it may be WAITING for memory, or LEAVING it once its last request is answered.
        reason: one sentence; None where there is nothing to say.
    """

    name: str
    state: str
    reason: str | None


def read() -> RackStatus:
    """The state of this process's Ray. Blocks; raises as look.look and current.recorded."""
    address = ray.get_runtime_context().gcs_address
    rack = current.recorded(os.environ)
    simulated = rack is not None and rack.address == address and rack.simulated
    return look.look(roster.client_of(address), address, simulated, session_folder())


class RackView:
    """The last reading, for all who ask. `read`: takes one."""

    def __init__(self, read: Callable[[], RackStatus] = read) -> None:
        self._read = read
        self._reading: asyncio.Task[RackStatus] | None = None
        self._began = 0.0

    async def status(self) -> RackStatus:
        """As of a second ago at most. Raises RefusalError (503): the head is silent, or says what it should not."""
        if self._reading is None or (self._reading.done() and time.monotonic() - self._began > FRESH_S):
            self._began = time.monotonic()
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        reading = self._reading
        await asyncio.wait({reading}, timeout=WAIT_S)
        if not reading.done():
            raise RefusalError(*openai_errors.unavailable(SILENT))
        try:
            return reading.result()
        except PomariumError as error:
            raise RefusalError(*openai_errors.unavailable(str(error))) from error
        except (RayError, RpcError) as error:
            logger.warning("The state of the rack could not be read: %s", error)
            raise RefusalError(*openai_errors.unavailable(SILENT)) from error


def model_state(name: str, sleeps: bool, known: State, found: RackStatus) -> ModelState:
    """Pure. sleeps: the model may be without an engine. known: what Serve and waiting replicas say of it."""
    if any(report.model == name for report in found.serving):
        return ModelState(name, SERVING, reasons.explain(known, "") if known.waiting else None)
    if known.waiting or known.waking:
        return ModelState(name, WAKING if known.waking else WAITING, reasons.explain(known, "") or None)
    if known.running:  # vLLM's own backend has no stages, and tells nothing of itself
        return ModelState(name, SERVING, None)
    if sentence := faults.marked_sentence(known.message):
        return ModelState(name, FAILED, sentence)
    if known.lost:
        return ModelState(name, LOST, reasons.explain(known, ""))
    if sleeps:
        return ModelState(name, ASLEEP, None)
    return ModelState(name, STARTING, reasons.explain(known, reasons.UNKNOWN))


def document(found: RackStatus, models: Iterable[ModelState]) -> dict[str, Any]:
    """What `rack status --json` prints, and beside it `models`, of which only the endpoint knows."""
    return status.document(found) | {"models": [asdict(model) for model in models]}
