"""Models that are loaded when they are asked for: who waits for which, and what Serve is told of it.

    request --needed(name): held until the model is there; counted while it is answered--> OnDemand
    OnDemand --Resident of each--> residence.decide --replicas, 0 or 1--> scale: Serve's controller
             <--State of each, every second while one comes or goes-- read: Serve, waiting replicas

It lives in the one ingress of such an endpoint, which all requests pass: so it knows to the request what runs, tells
Serve to end an engine only when nothing does, and hands a request to an engine only while that one stays. What it knows
of Serve's side is read anew; after a loss of the ingress it begins with what is there.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from ray.exceptions import RayError, RpcError
from ray.serve.exceptions import RayServeException

from pomarium.cluster import faults
from pomarium.cluster.autoscaling.policy import Tries, WakePolicy, failed
from pomarium.cluster.endpoint import rack_view, residence
from pomarium.cluster.endpoint.holding import HopelessError, State
from pomarium.cluster.endpoint.residence import Decision, Phase, Resident, Rules
from pomarium.cluster.node.ray_names import deployment_name

logger = logging.getLogger(__name__)

BUSY_LOOK_S, LOOK_S = 0.5, 5.0
"""How often Serve is asked while a model comes or goes or somebody waits, and else."""

REPLACED = (RayError, RpcError, RayServeException)
"""What is raised while Serve's controller is being replaced."""

LONGEST_S = 900.0
"""How long a request is held: a model that is loaded from a slow disk, behind others that have their turn."""

PAUSES = WakePolicy(first_pause_s=10.0, longest_pause_s=600.0)
"""After starts that failed a model is refused for so long: each try would take memory from others."""


@dataclass(frozen=True)
class OnDemandModels:
    """What may be loaded.

    Attributes:
        sizes: bytes that each takes, by name, in the order in which they are served. pinned: names. rules: of all.
    """

    sizes: Mapping[str, int]
    pinned: frozenset[str]
    rules: Rules


@dataclass
class _Model:
    """A model.

    Attributes:
        wanted: engines that Serve is to have, 0 or 1. told: that it was told last; None: nothing yet.
        held: requests that wait, and since when each. reason: what its last start failed of, a sentence.
        unfit: why it can never be loaded. before: what Serve said of it when it was last asked for, which it goes on to
            say. began: since then an engine of it was there.
    """

    size: int
    pinned: bool
    unfit: str | None = None
    phase: Phase = Phase.ABSENT
    since: float = 0.0
    used: float = 0.0
    running: int = 0
    wanted: int = 0
    told: int | None = None
    held: dict["asyncio.Future[None]", float] = field(default_factory=dict)
    tries: Tries = field(default_factory=Tries)
    reason: str | None = None
    before: str = ""
    began: bool = False


class OnDemand:
    """The models of an endpoint that are loaded when asked for.

    `read`: what is known of each deployment now; blocks. `scale`: tells Serve how many engines a deployment is to have;
    raises RayError while it cannot be told.
    """

    def __init__(
        self,
        models: OnDemandModels,
        read: Callable[[], Mapping[str, State]],
        scale: Callable[[str, int], Awaitable[None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules, self._read, self._scale, self._clock = models.rules, read, scale, clock
        unfit = residence.unfit(models.sizes, models.pinned, models.rules.memory)
        self._models = {
            name: _Model(size, name in models.pinned, unfit.get(name)) for name, size in models.sizes.items()
        }
        self._last = Decision()
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over what is there, and look after it from now on. Raises RayError."""
        found = await asyncio.to_thread(self._read)
        for name, model in self._models.items():
            state = found.get(deployment_name(name), State())
            keeps = model.pinned or state.running > 0
            model.wanted = int(keeps and model.unfit is None)
            if state.there:  # one that is on its way is asked for anew, if somebody still waits
                self._enter(model, Phase.UP if state.running else Phase.LOADING if keeps else Phase.ENDING)
        self._task = asyncio.create_task(self._run())

    def check(self) -> None:
        """Raises RuntimeError if it looks after nothing any more."""
        if self._task is not None and self._task.done():
            raise RuntimeError("models on demand are not looked after any more") from self._task.exception()

    def end(self, reason: str) -> None:
        """Nobody is let in any more: who waits is told so."""
        for model in self._models.values():
            self._refuse(model, reason)

    @asynccontextmanager
    async def needed(self, name: str) -> AsyncIterator[None]:
        """`name`, which fits, is there, and stays as long as the context is open. Raises HopelessError: it will not."""
        model = self._models[name]
        if model.phase is Phase.UP and name not in self._last.leave:
            model.running += 1
        else:
            await self._held(model)
        try:
            yield
        finally:
            model.running -= 1
            model.used = self._clock()
            self._news.set()

    async def _held(self, model: _Model) -> None:
        """Until it counts among what runs. Raises HopelessError."""
        now = self._clock()
        if model.reason is not None and now < model.tries.not_before:
            raise HopelessError(f"{model.reason.removesuffix('.')}; it is tried again in some seconds")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        model.held[turn] = now
        self._news.set()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                model.running -= 1  # it was let in while its client left
            raise
        finally:
            model.held.pop(turn, None)
            self._news.set()

    def unfit(self, name: str) -> str | None:
        """Why `name` can never be loaded, one sentence; None: it can."""
        return self._models[name].unfit

    def state(self, name: str) -> rack_view.ModelState:
        """How it is with `name` now."""
        model = self._models[name]
        if model.unfit is not None:
            return rack_view.ModelState(name, rack_view.FAILED, model.unfit)
        if model.phase is Phase.UP:
            leaving = name in self._last.leave
            return rack_view.ModelState(name, rack_view.LEAVING if leaving else rack_view.SERVING, None)
        if model.phase is Phase.LOADING and not (model.pinned and model.reason):
            return rack_view.ModelState(name, rack_view.STARTING, None)
        if model.held:
            return rack_view.ModelState(name, rack_view.WAITING, self._last.waits.get(name))
        if model.reason is not None:
            return rack_view.ModelState(name, rack_view.FAILED, model.reason)
        return rack_view.ModelState(name, rack_view.ASLEEP, None)

    def _residents(self) -> list[Resident]:
        now = self._clock()
        return [
            Resident(
                name,
                model.size,
                model.pinned and model.unfit is None,
                model.phase,
                model.since,
                now if model.running else model.used,
                model.running,
                min(model.held.values(), default=None),
            )
            for name, model in self._models.items()
        ]

    async def _run(self) -> None:
        while True:
            self._news.clear()
            try:
                await self._step()
            except REPLACED:  # what it is to do is told with the next step
                logger.warning("Serve could not be asked, or told, about models on demand.", exc_info=True)
            busy = any(
                model.held or model.wanted != model.told or model.phase in (Phase.LOADING, Phase.ENDING)
                for model in self._models.values()
            )
            if busy:
                await asyncio.sleep(BUSY_LOOK_S)
            else:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._news.wait(), LOOK_S)

    async def _step(self) -> None:
        """Look, decide, and have it done. Raises RayError."""
        found = await asyncio.to_thread(self._read)
        for name, model in self._models.items():
            state = found.get(deployment_name(name))
            if state is not None:  # else Serve is being replaced, and knows nothing
                self._see(name, model, state)
        now = self._clock()
        fitting = [resident for resident in self._residents() if self._models[resident.name].unfit is None]
        self._last = residence.decide(fitting, now, self._rules)
        for name in self._last.leave:
            model = self._models[name]
            if not model.running:
                logger.info("%s leaves memory.", name)
                model.wanted = 0
                self._enter(model, Phase.ENDING)
        for name in self._last.load:
            logger.info("%s is loaded.", name)
            model = self._models[name]
            model.wanted, model.began = 1, False
            model.before = found.get(deployment_name(name), State()).message
            self._enter(model, Phase.LOADING)
        for name, model in self._models.items():
            self._answer(name, model, now)
        for name, model in self._models.items():
            if model.told != model.wanted:
                await self._scale(deployment_name(name), model.wanted)
                model.told = model.wanted

    def _see(self, name: str, model: _Model, state: State) -> None:
        """Take in what Serve says. What it was not told yet, it does not know."""
        if model.told != model.wanted:
            return
        if not model.wanted:
            if model.phase is Phase.ENDING and not state.there:
                self._enter(model, Phase.ABSENT)
            return
        if state.running:
            if model.phase is not Phase.UP:
                self._enter(model, Phase.UP)
                model.tries, model.reason = Tries(), None
            return
        self._enter(model, Phase.LOADING)
        news = state.message != model.before or (model.began and not state.there)
        model.began = model.began or state.there > 0
        if news and (sentence := faults.marked_sentence(state.message)):
            model.before = state.message
            if not model.pinned:  # else Serve tries again by itself, and all that is asked meanwhile is refused
                logger.warning("%s could not be loaded: %s", name, sentence)
                model.tries, model.wanted = failed(model.tries, self._clock(), PAUSES), 0
                self._enter(model, Phase.ENDING)
            model.reason = sentence
            self._refuse(model, sentence)

    def _answer(self, name: str, model: _Model, now: float) -> None:
        """Let in who waits for what is there; send away who has waited for too long."""
        if model.phase is Phase.UP and name not in self._last.leave:
            for turn in list(model.held):
                if not turn.done():
                    model.running += 1
                    turn.set_result(None)
            model.held.clear()
        for turn, since in list(model.held.items()):
            if now - since > LONGEST_S and not turn.done():
                said = self._last.waits.get(name, "it is being loaded")
                turn.set_exception(HopelessError(f"it was not there within {LONGEST_S:g} s: {said}"))

    def _refuse(self, model: _Model, reason: str) -> None:
        for turn in model.held:
            if not turn.done():
                turn.set_exception(HopelessError(reason))
        model.held.clear()

    def _enter(self, model: _Model, phase: Phase) -> None:
        if model.phase is not phase and phase is Phase.UP:
            model.since = model.used = self._clock()
        model.phase = phase
