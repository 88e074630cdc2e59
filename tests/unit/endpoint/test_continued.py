"""Which answers are asked for again, and what their client sees of it."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from pomarium.cluster import faults
from pomarium.cluster.endpoint import continued
from pomarium.cluster.endpoint.answers import Accepted, CutError
from pomarium.cluster.endpoint.continued import UNTAKEN, Continued, EndpointEndsError, hopeless
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineFaultError, EngineGoneError, EngineLostError, EngineMovedError
from pomarium.cluster.replica.serve_plan import LIMITS, Limits

NOTHING_KNOWN = State()
STREAM, WHOLE = Head(200, "text/event-stream"), Head(200, "application/json")
LOST = EngineLostError("its worker was killed")


class Attempt:
    """What one replica makes of a request: items, and perhaps the error that it ends with."""

    def __init__(self, *items: Any, resumable: bool = True) -> None:
        self._items = list(items)
        self.begun = False
        self.replica = ""
        self.resumable = resumable
        self.cancelled = False
        self.before: Resume | None = None
        self._pieces: list[bytes] = []
        self._waits: asyncio.Future[None] | None = None

    def __aiter__(self) -> "Attempt":
        return self

    async def __anext__(self) -> Any:
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if item == "wait":
            self._waits = asyncio.get_running_loop().create_future()
            await self._waits
        if isinstance(item, Exception):
            raise item
        if isinstance(item, Accepted):
            self.begun, self.replica = True, "r"
        if isinstance(item, bytes):
            self._pieces.append(item)
        return item

    def fail(self, error: Exception) -> None:
        if self._waits is not None:
            self._waits.set_exception(error)

    def gained(self) -> int:
        return (self.before.messages if self.before else 0) + len(self._pieces)

    def resume(self) -> Resume:
        return Resume(self.gained(), b"", b"")

    def cancel(self) -> None:
        self.cancelled = True


class Played:
    """What a client got, what it ended with, and what was asked.

    Attributes:
        resumes: of each attempt after the first. lost: replicas that were told of. waits: of resumptions.
    """

    def __init__(
        self, *attempts: Attempt, limits: Limits = LIMITS, state: State = NOTHING_KNOWN, kept: bool = True
    ) -> None:
        self.resumes: list[Resume | None] = []
        self.lost: list[str] = []
        self.waits: list[float] = []
        self.error: Exception | None = None
        self.attempts = list(attempts)
        left = list(attempts[1:])

        def again(resume: Resume | None) -> Any:
            self.resumes.append(resume)
            left[0].before = resume
            return left.pop(0)

        async def known() -> State:
            return state

        async def play() -> list[Any]:
            got = []
            asked: Callable[[Resume | None], Any] | None = again if kept else None
            answer = Continued("r", attempts[0], asked, limits, known, self.lost.append, self.waits.append)  # type: ignore[arg-type]
            try:
                async for item in answer:
                    got.append(item)
            except Exception as error:  # noqa: BLE001 # it is what the test is about
                self.error = error
            answer.cancel()
            return got

        self.got = asyncio.run(play())


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continued, "LOOK_S", 0.001)


@pytest.mark.parametrize("loss", [LOST, CutError(), SilentError(), ActorDiedError()])
def test_a_stream_goes_on_behind_what_came(loss: Exception) -> None:
    played = Played(Attempt(Accepted(), STREAM, b"1", b"2", loss), Attempt(Accepted(), b"3"))
    assert (played.got, played.error) == ([Accepted(), STREAM, b"1", b"2", b"3"], None)
    assert [resume.messages for resume in played.resumes if resume] == [2]
    assert (played.lost, len(played.waits)) == (["r"], 1)
    assert played.attempts[0].cancelled


def test_an_answer_that_comes_whole_is_begun_anew() -> None:
    played = Played(Attempt(Accepted(), WHOLE, b"1", LOST), Attempt(Accepted(), WHOLE, b"1", b"2"))
    assert (played.got, played.error) == ([Accepted(), WHOLE, b"1", b"2"], None)
    assert played.resumes == [None]


def test_a_stream_waits_for_the_next_replica() -> None:
    absent = [Attempt(NoReplicaError()), Attempt(EngineGoneError("dead")), Attempt(SilentError())]
    played = Played(Attempt(Accepted(), STREAM, b"1", LOST), *absent, Attempt(Accepted(), b"2"))
    assert (played.got, played.error) == ([Accepted(), STREAM, b"1", b"2"], None)


def test_it_does_not_wait_for_ever() -> None:
    absent = [Attempt(NoReplicaError()) for _ in range(200)]
    played = Played(Attempt(Accepted(), STREAM, b"1", LOST), *absent, limits=Limits(5, 0.05))
    assert isinstance(played.error, EngineLostError)
    assert "its worker was killed; no other took over within 0.05 s" in str(played.error)
    played = Played(Attempt(Accepted(), STREAM, b"1", LOST), Attempt("wait"), limits=Limits(5, 0.05))
    assert "no other took over" in str(played.error)


def test_nor_where_there_is_no_hope() -> None:
    full = State(message=str(faults.StartError("The disk is full.")))
    played = Played(Attempt(Accepted(), STREAM, b"1", LOST), Attempt(NoReplicaError()), state=full)
    assert str(played.error) == "its worker was killed; The disk is full."


def test_what_no_engine_took_is_sent_elsewhere_and_waits_for_nobody() -> None:
    played = Played(Attempt(EngineGoneError("dead")), Attempt(Accepted(), STREAM, b"1"))
    assert (played.got, played.error, played.waits) == ([Accepted(), STREAM, b"1"], None, [])
    played = Played(Attempt(CutError()), Attempt(NoReplicaError()))
    assert isinstance(played.error, CutError)
    played = Played(*(Attempt(EngineGoneError("dead")) for _ in range(UNTAKEN + 1)))
    assert isinstance(played.error, EngineGoneError)
    assert len(played.resumes) == UNTAKEN - 1
    assert isinstance(Played(Attempt(NoReplicaError())).error, NoReplicaError)


def test_a_request_that_kills_engines_is_given_up() -> None:
    played = Played(Attempt(Accepted(), LOST), Attempt(Accepted(), LOST), Attempt(Accepted(), STREAM, b"1"))
    assert played.error is LOST
    assert len(played.resumes) == 1


@pytest.mark.parametrize(
    "played",
    [
        lambda: Played(Attempt(Accepted(), STREAM, b"1", LOST), limits=Limits(0, 9.0)),
        lambda: Played(Attempt(Accepted(), STREAM, b"1", LOST), kept=False),
        lambda: Played(Attempt(Accepted(), STREAM, b"1", LOST, resumable=False), Attempt(Accepted(), b"2")),
        lambda: Played(Attempt(Accepted(), STREAM, b"1", LOST), Attempt(Accepted(), EngineFaultError("not so"))),
    ],
)
def test_what_cannot_go_on_ends_with_its_engine(played: Callable[[], Played]) -> None:
    found = played()
    assert (found.got, found.error) == ([Accepted(), STREAM, b"1"], LOST)


@given(st.lists(st.integers(0, 3), max_size=8), st.integers(0, 6))
def test_who_gains_something_may_lose_so_many(gains: list[int], times: int) -> None:
    given_up = hopeless(gains, Limits(times, 1.0))
    assert given_up == (len(gains) > times or gains[-2:] == [0, 0])


MOVED = EngineMovedError("mac-2 is being drained")


def test_what_a_drained_mac_leaves_goes_on_and_counts_as_no_loss() -> None:
    moved = [Attempt(Accepted(), MOVED) for _ in range(9)]
    played = Played(Attempt(Accepted(), STREAM, b"1", MOVED), *moved, Attempt(Accepted(), b"2"), limits=Limits(1, 60.0))
    assert (played.got, played.error) == ([Accepted(), STREAM, b"1", b"2"], None)
    assert {resume.messages for resume in played.resumes if resume} == {1}
    assert len(played.waits) == 1


def test_it_waits_for_the_next_engine_as_after_a_loss() -> None:
    def absent() -> list[Attempt]:
        return [Attempt(NoReplicaError()), Attempt(EngineGoneError("mac-2 is being drained"))]

    played = Played(Attempt(Accepted(), STREAM, b"1", MOVED), *absent(), Attempt(Accepted(), b"2"))
    assert (played.got, played.error) == ([Accepted(), STREAM, b"1", b"2"], None)
    whole = Played(Attempt(Accepted(), WHOLE, b"1", MOVED), *absent(), Attempt(Accepted(), WHOLE, b"1", b"2"))
    assert (whole.got, whole.error) == ([Accepted(), WHOLE, b"1", b"2"], None)


def test_without_failovers_it_ends() -> None:
    played = Played(Attempt(Accepted(), STREAM, b"1", MOVED), limits=Limits(0))
    assert played.error is MOVED


@pytest.mark.parametrize(
    "attempts",
    [
        [Attempt(Accepted(), STREAM, b"a", "wait")],
        [Attempt("wait")],
        [Attempt(Accepted(), STREAM, b"a", LOST), Attempt("wait")],
        [Attempt(Accepted(), STREAM, b"a", LOST), *(Attempt(NoReplicaError()) for _ in range(10_000))],
    ],
    ids=["answering", "untaken", "resumed", "without a replica"],
)
def test_an_endpoint_that_ends_ends_its_answers(attempts: list[Attempt]) -> None:
    left = attempts[1:]

    async def known() -> State:
        return NOTHING_KNOWN

    async def play() -> list[Any]:
        answer = Continued("r", attempts[0], lambda _: left.pop(0), LIMITS, known, lambda _: None)  # type: ignore[arg-type, return-value]
        got: list[Any] = []

        async def follow() -> None:
            async for item in answer:
                got.append(item)

        following = asyncio.create_task(follow())
        await asyncio.sleep(0.05)
        assert not following.done()
        answer.end()
        with pytest.raises(EndpointEndsError):
            await asyncio.wait_for(following, 30)
        return got

    got = asyncio.run(play())
    assert [item for item in got if isinstance(item, bytes)] == ([] if attempts[0].gained() == 0 else [b"a"])
