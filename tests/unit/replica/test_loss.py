"""What a client reads of an engine that dies, and what it died of."""

import asyncio

import pytest

from pomarium.cluster.faults import Loss
from pomarium.cluster.http.asgi_bridge import Collected, Head
from pomarium.cluster.replica import loss
from pomarium.cluster.replica.loss import EngineLostError, Honest, cause, error_event

JSON, SSE = "application/json", "text/event-stream; charset=utf-8"
TOKEN = b'data: {"id": "1", "choices": [{"text": "data: {\\"error\\": "}]}\n\n'
ERROR = b'data: {"error": {"message": "EngineCore encountered an issue.", "code": 500}}\n\n'
DONE = b"data: [DONE]\n\n"


class Kept(Collected):
    """Keeps head and pieces in order."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.items: list[Head | bytes] = []

    async def head(self, head: Head) -> None:
        self.items.append(head)

    async def piece(self, piece: bytes) -> None:
        self.items.append(piece)


def passed(*items: Head | bytes, dead: bool) -> tuple[list[Head | bytes], str]:
    """What reached the client, and the loss it ended with, if any."""

    async def confirm() -> None:
        if dead:
            raise EngineLostError("its worker was killed")

    async def run() -> tuple[list[Head | bytes], str]:
        kept = Kept()
        honest = Honest(kept, confirm)
        for item in items:
            await (honest.head(item) if isinstance(item, Head) else honest.piece(item))
        try:
            honest.raise_loss()
        except EngineLostError as lost:
            return kept.items, str(lost)
        return kept.items, ""

    return asyncio.run(run())


def test_what_a_living_engine_answers_passes_as_it_is() -> None:
    for items in ([Head(500, JSON), b"{}"], [Head(200, SSE), TOKEN, ERROR + DONE], [Head(200, JSON), ERROR]):
        assert passed(*items, dead=False) == (items, "")


def test_a_5xx_of_a_dead_engine_is_a_loss() -> None:
    assert passed(Head(500, JSON), b"{}", dead=True) == ([], "its worker was killed")


def test_an_error_event_of_a_dead_engine_is_a_loss_after_the_tokens_before_it() -> None:
    head = Head(200, SSE)
    assert passed(head, TOKEN, TOKEN + ERROR + DONE, dead=True) == ([head, TOKEN, TOKEN], "its worker was killed")
    assert passed(head, ERROR, DONE, dead=True) == ([head], "its worker was killed")


def test_what_was_whole_before_the_engine_died_stays_so() -> None:
    for items in ([Head(200, JSON), b"{}"], [Head(200, SSE), TOKEN, DONE], [Head(400, JSON), ERROR]):
        assert passed(*items, dead=True) == (items, "")


def test_the_error_event_is_found_at_the_start_of_an_event_only() -> None:
    assert error_event(ERROR) == 0
    assert error_event(TOKEN + ERROR) == len(TOKEN)
    assert error_event(TOKEN + DONE) is None
    named = b'event: error\ndata: {"type": "error"}\n\n'
    assert (error_event(named), error_event(TOKEN + named + ERROR)) == (0, len(TOKEN))


@pytest.mark.parametrize(
    ("left", "exit_code", "expected"),
    [
        (Loss("worker 1 was lost: UNAVAILABLE", 1), None, "mac-2 is gone"),
        (Loss("worker 0 was lost: UNAVAILABLE", 0), -9, "worker 0 was lost: UNAVAILABLE"),
        (Loss("RecursionError: too deep."), 1, "RecursionError: too deep"),
        (Loss("ValueError: long ago"), -9, "its process EngineCore was killed by signal 9 (SIGKILL: by hand, or by the "
         "system when memory runs out)"),
        (None, -11, "its process EngineCore was killed by signal 11 (SIGSEGV)"),
        (None, 3, "its process EngineCore ended with exit code 3"),
        (None, None, "its process EngineCore ended"),
    ],
)  # fmt: skip
def test_the_cause(left: Loss | None, exit_code: int | None, expected: str) -> None:
    assert cause(left, exit_code, {1: "mac-2 is gone"}.get) == expected


def test_signals_have_names() -> None:
    assert loss.signal_name(15) == "signal 15 (SIGTERM)"
    assert loss.signal_name(64 + 1) == "signal 65 (unknown)"
