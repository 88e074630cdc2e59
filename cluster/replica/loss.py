"""An engine that dies while it answers: what vLLM's application says then is not what a client is to read.

    vLLM's application --Head, bytes, ...--> honest --the same, or EngineLostError with the reason--> relay.py: 503

vLLM answers what an engine was working on when it died with status 500, or with a last event of that code where a
stream had begun, and "See stack trace (above)" (vllm/entrypoints/serve/exception_handling, generate/base/serving.py).
"""

import signal
from collections.abc import AsyncGenerator, Awaitable, Callable

from pomarium.cluster.faults import Loss
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.worker.errors import PomariumError

EVENT_STREAM = "text/event-stream"
_ERROR_EVENT = b'data: {"error":'
_EVENT_END = b"\n\n"


class EngineFaultError(PomariumError):
    """What an engine raised, as text."""


class EngineLostError(EngineFaultError):
    """The engine is dead. The text is the reason, a clause."""


async def honest(
    answer: AsyncGenerator[Head | bytes, None], confirm: Callable[[], Awaitable[None]]
) -> AsyncGenerator[Head | bytes, None]:
    """`answer`, up to where it tells of a dead engine. Closing it closes `answer`.

    Args:
        confirm: raises EngineLostError if the engine is dead.

    Raises:
        EngineLostError: instead of an answer of status 5xx, of an error event, or of what `answer` raises.
    """
    streamed = False
    try:
        async for item in answer:
            if isinstance(item, Head):
                if item.status >= 500:
                    await confirm()
                streamed = item.media_type.startswith(EVENT_STREAM)
            elif streamed and (at := error_event(item)) is not None:
                try:
                    await confirm()
                except EngineLostError:
                    if at:
                        yield item[:at]
                    raise
            yield item
    except EngineLostError:
        raise
    except Exception:
        await confirm()
        raise
    finally:
        await answer.aclose()


def error_event(piece: bytes) -> int | None:
    """Where in `piece`, which consists of whole server-sent events, the first one begins that tells of an error."""
    if piece.startswith(_ERROR_EVENT):
        return 0
    at = piece.find(_EVENT_END + _ERROR_EVENT)
    return None if at < 0 else at + len(_EVENT_END)


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
