"""What the terminal tells of an endpoint that was up: that it stopped answering, why, and that it is back.

    Ray's head, does it answer? serve_actors, rack.reports, Serve's controller --look--> Status --Watch.step--> lines

Ray's head is asked first: without it everything else waits for ever, and after a minute every process of Ray's ends
itself, this one too, without a word. Before that, who watches ends the endpoint in order. Import this module once Ray
runs: it imports Ray.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from pomarium.cluster import faults
from pomarium.cluster.endpoint.local_ray import HeadLostError
from pomarium.cluster.machine import disk
from pomarium.cluster.node import ray_address
from pomarium.cluster.node.ray_folder import session_folder
from pomarium.cluster.node.ray_names import ENGINE_PREFIX, deployment_name
from pomarium.cluster.rack import reports, serve_actors
from pomarium.cluster.rack.reports import LossReport
from pomarium.cluster.rack.serve_actors import CONTROLLER, ENGINE, INGRESS, ServeActor
from pomarium.cluster.replica.serve_plan import APP_NAME

logger = logging.getLogger(__name__)

LOOK_S = 2.0
"""How long a look may take before Ray's head is asked again."""
RECENT_S = 60.0
"""How long ago a loss may be that Serve tells of."""
HEAD_GONE_S = 3.0
"""How long Ray's head takes no connections before it counts as ended: nothing brings it back."""
HEAD_GRACE_S = 40.0
"""For how long what still runs goes on to serve then. Ray's processes end by themselves after 60 s."""

HEAD_GONE = "Ray's head process (GCS) has ended"
AGAIN = "Serve starts another"
CONTROLLER_LOST = "Serve's controller was lost; engines go on to serve while Ray starts another"


@dataclass(frozen=True)
class Status:
    """Whether all of the endpoint runs, and what is to be said of it, if anything.

    Attributes:
        restarts: of Serve's controller, as far as known. It may be lost and back between two looks.
    """

    running: bool
    message: str = ""
    restarts: int | None = None


class Watch:
    """Tells of changes, through `say`. `look`: the endpoint's status, given since when losses count (Unix time)."""

    def __init__(
        self,
        say: Callable[[str], None],
        look: Callable[[float], Status],
        head_answers: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._say, self._look, self._head_answers, self._clock = say, look, head_answers, clock
        self._told = Status(True)
        self._restarts: int | None = None
        self._since = self._ready_at = clock()
        self._silent_since: float | None = None
        self._head_gone_at: float | None = None
        self._asked: Future[Status] | None = None

    def step(self) -> None:
        """Look once. Raises HeadLostError once Ray's head has been gone for HEAD_GRACE_S."""
        now = self._clock()
        if not self._head_answers():
            self._without_head(now)
            return
        if self._head_gone_at is not None:  # a network that came back in time: nobody has given up yet
            self._tell("Ray's head answers again")
            self._head_gone_at = None
        self._silent_since = None
        if self._told.running:  # Serve tells of a loss seconds after it; an earlier one was told and is over
            self._since = max(self._ready_at, now - RECENT_S)
        if (status := self._looked()) is None:
            return
        if self._back_already(status):
            self._show(Status(False, CONTROLLER_LOST))
        if status.running and not self._told.running:
            self._ready_at = now
        self._show(status)

    def _back_already(self, status: Status) -> bool:
        """Whether Serve's controller was lost and is back, and no look has seen it."""
        before = self._restarts
        if status.restarts is not None:
            self._restarts = status.restarts
        known = before is not None and status.restarts is not None
        return known and status.running and self._told.running and before != status.restarts

    def _show(self, status: Status) -> None:
        if (status.running, status.message) != (self._told.running, self._told.message):
            good = "there is room on the disks again" if self._told.running else "ready again"
            self._tell(status.message or good)
            self._told = status

    def _without_head(self, now: float) -> None:
        self._silent_since = self._silent_since or now
        if self._head_gone_at is None and now - self._silent_since >= HEAD_GONE_S:
            self._head_gone_at = now
            self._tell(f"{HEAD_GONE}: engines go on for {HEAD_GRACE_S:g} s, and then all of it ends")
        elif self._head_gone_at is not None and now - self._head_gone_at > HEAD_GRACE_S:
            raise HeadLostError(
                f"{HEAD_GONE}, and so the endpoint was stopped. Start it again (a rack: `pomarium rack down`, "
                "`pomarium rack up`)."
            )

    def _looked(self) -> Status | None:
        """The answer of `look`; None while there is none. A head that ends meanwhile leaves it without one for good."""
        if self._asked is None:
            self._asked = Future()
            threading.Thread(target=_answer, args=(self._asked, self._look, self._since), daemon=True).start()
        try:
            status = self._asked.result(LOOK_S)
        except TimeoutError:
            return None
        except Exception:
            logger.exception("The endpoint's state could not be read.")
            status = None
        self._asked = None
        return status

    def _tell(self, text: str) -> None:
        try:
            self._say(f"{time.strftime('%H:%M:%S', time.localtime(self._clock()))} {text}")
        except OSError:  # a file on a disk that is full, say: no reason to end what serves; it is written with the next
            logger.warning("This could not be written: %s", text, exc_info=True)


def _answer(asked: "Future[Status]", look: Callable[[float], Status], since: float) -> None:
    try:
        asked.set_result(look(since))
    except BaseException as error:  # noqa: BLE001 - raised where the answer is waited for
        asked.set_exception(error)


def head_answers() -> bool:
    """Whether the head of this process's Ray takes connections."""
    import ray

    return ray_address.answers(ray.get_runtime_context().gcs_address)


def shortage() -> str | None:
    """A sentence on a full disk of this machine, if there is one."""
    return disk.shortage(disk.rooms(session_folder()))


def look(since: float) -> Status:
    """How the endpoint is doing, as Ray's head and Serve's controller know it. since: Unix time, of losses to tell."""
    from ray import serve

    actors = serve_actors.read()
    if not any(actor.alive for actor in actors if actor.kind == CONTROLLER):
        return Status(False, CONTROLLER_LOST)
    known = serve.status().applications.get(APP_NAME)
    restarts = _restarts(serve_actors.read())
    if restarts != _restarts(actors):  # it came back while `serve.status` waited for it
        return Status(False, CONTROLLER_LOST)
    if known is None:
        return Status(False, "Serve does not know the endpoint any more: somebody has removed it")
    full = shortage()
    if known.status == "RUNNING":
        return Status(True, f"{full} What is lost does not start again before" if full else "", restarts)
    messages = {name: deployment.message for name, deployment in known.deployments.items()}
    said = told(messages, actors, reports.read_losses(), since)
    return Status(False, f"{said}. {full}" if full else said)


def _restarts(actors: Sequence[ServeActor]) -> int:
    return max((actor.restarts for actor in actors if actor.kind == CONTROLLER), default=0)


def told(messages: Mapping[str, str], actors: Sequence[ServeActor], losses: Sequence[LossReport], since: float) -> str:
    """One line on what does not run.

    Args:
        messages: of Serve, by deployment. actors: the oldest first. losses: the last of each model.
        since: Unix time from which on losses count.
    """
    for message in messages.values():
        if sentence := faults.marked_sentence(message):
            return f"an engine does not start: {sentence.removesuffix('.')}; Serve tries again"
    found = [
        f"{name.removeprefix(ENGINE_PREFIX)}: {said}"
        for name in messages
        if (said := loss_of(name, actors, losses, since))
    ]
    if found:
        return f"an engine was lost ({'; '.join(found)}); {AGAIN}"
    if said := _lost_ingress(actors, since):
        return f"one of the ingresses was lost ({said}); the others go on, and {AGAIN}"
    if parts := serve_actors.missing(actors, serve_actors.running(actors)):
        return "; ".join(map(str, parts))
    return "Serve looks whether all engines are there"


def _lost_ingress(actors: Sequence[ServeActor], since: float) -> str | None:
    """What the last one that was lost since then ended of, where another is left."""
    ingresses = [actor for actor in actors if actor.kind == INGRESS]
    ended = [actor.end for actor in ingresses if actor.end and actor.ended >= since]
    return ended[-1] if ended and any(actor.alive for actor in ingresses) else None


def loss_of(deployment: str, actors: Sequence[ServeActor], losses: Sequence[LossReport], since: float) -> str | None:
    """What the last engine of a deployment that was lost since then died of, a clause; None if none was."""
    said = next((loss for loss in losses if deployment_name(loss.model) == deployment and loss.written >= since), None)
    ended = [a for a in actors if a.kind == ENGINE and a.deployment == deployment and a.end and a.ended >= since]
    # An engine that could tell why it died knows more than Ray, which sees the end of its process.
    unsaid = [a for a in ended if said is None or (a.replica != said.replica and a.ended > said.written)]
    if unsaid:
        return unsaid[-1].end
    return None if said is None else said.reason
