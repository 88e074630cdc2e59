"""An engine that dies while it answers: what vLLM's application says then is not what a client is to read.

    vLLM's application --head, pieces--> Honest --the same, up to where it tells of a dead engine--> whoever asked
                                           `--raise_loss--> EngineLostError with the reason --> relay.py: 503

vLLM answers what an engine was working on when it died with status 500, or with a last event of that code where a
stream had begun, and "See stack trace (above)" (vllm/entrypoints/serve/exception_handling, generate/base/serving.py).
"""

import signal
from collections.abc import Awaitable, Callable

from pomarium.cluster.faults import Loss
from pomarium.cluster.http.asgi_bridge import Exchange, Head
from pomarium.worker.errors import PomariumError

EVENT_STREAM = "text/event-stream"
_ERROR_EVENTS = (b'data: {"error":', b"event: error\n")
"""How an event begins that tells of an error: OpenAI's, and the named one of Anthropic's Messages."""
_EVENT_END = b"\n\n"


class EngineFaultError(PomariumError):
    """What an engine raised, as text."""


class EngineLostError(EngineFaultError):
    """The engine is dead. The text is the reason, a clause."""


class EngineGoneError(EngineLostError):
    """The engine was dead before the request came to it."""


class EngineMovedError(EngineLostError):
    """The engine is to end, and leaves what it was answering to another one: a loss that was planned."""


class Honest:
    """An Exchange that passes an answer on to `exchange`, up to where it tells of a dead engine.

    Attributes:
        gone: of `exchange`.
    """

    def __init__(self, exchange: Exchange, confirm: Callable[[], Awaitable[None]]) -> None:
        """`confirm`: raises EngineLostError if the engine is dead."""
        self.gone = exchange.gone
        self._exchange = exchange
        self._confirm = confirm
        self._streamed = False
        self._lost: EngineLostError | None = None

    async def body(self) -> tuple[bytes, bool] | None:
        """See Exchange."""
        return await self._exchange.body()

    async def head(self, head: Head) -> None:
        """See Exchange."""
        if head.status >= 500 and await self._is_dead():
            return
        self._streamed = head.media_type.startswith(EVENT_STREAM)
        await self._exchange.head(head)

    async def piece(self, piece: bytes) -> None:
        """See Exchange."""
        if self._lost is not None:
            return
        if self._streamed and (at := error_event(piece)) is not None and await self._is_dead():
            piece = piece[:at]
        if piece:
            await self._exchange.piece(piece)

    def give_up(self) -> None:
        """See Exchange."""
        self._exchange.give_up()

    async def _is_dead(self) -> bool:
        try:
            await self._confirm()
        except EngineLostError as lost:
            self._lost = lost
        return self._lost is not None

    def raise_loss(self) -> None:
        """Raises EngineLostError if the answer ended with its engine."""
        if self._lost is not None:
            raise self._lost


def error_event(piece: bytes) -> int | None:
    """Where in `piece`, which consists of whole server-sent events, the first one begins that tells of an error."""
    if piece.startswith(_ERROR_EVENTS):
        return 0
    found = [at for event in _ERROR_EVENTS if (at := piece.find(_EVENT_END + event)) >= 0]
    return min(found) + len(_EVENT_END) if found else None


def cause(loss: Loss | None, exit_code: int | None, worker_end: Callable[[int], str | None]) -> str:
    """What an engine died of, as a clause.

    Args:
        loss: what its processes left.
        exit_code: of its process EngineCore, as of subprocess.Popen.returncode; None if that runs or is not known.
        worker_end: what became of the worker of a rank; None if nothing is known of it.
    """
    if loss is not None and loss.rank is not None:
        return worker_end(loss.rank) or loss.sentence.removesuffix(".")
    if exit_code is not None and exit_code < 0:
        return f"its process EngineCore was killed by {signal_name(-exit_code)}"
    if loss is not None:
        return loss.sentence.removesuffix(".")
    return "its process EngineCore ended" + ("" if exit_code is None else f" with exit code {exit_code}")


def signal_name(number: int) -> str:
    """For people: "signal 9 (SIGKILL: by hand, or by the system when memory runs out)"."""
    hint = ": by hand, or by the system when memory runs out" if number == signal.SIGKILL else ""
    known = signal.Signals(number).name if number in {one.value for one in signal.Signals} else "unknown"
    return f"signal {number} ({known}{hint})"
