"""Answers from a replica's lines to the ingress that asked: over real sockets, with real Starlette applications."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from ray.exceptions import ActorDiedError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pomarium.cluster.endpoint import answers as answers_module
from pomarium.cluster.endpoint.answers import MOST_WAITING, Accepted, Answer, Answers, CutError
from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.answer_frames import Asked, Kind, frame
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.room import Room
from pomarium.cluster.http.sealed_stream import SealedStream, dial
from pomarium.cluster.http.sealing import KEY_BYTES, End
from pomarium.cluster.replica import answering, heartbeat
from pomarium.cluster.replica.answering import Line, LineError, Lines, ReplyTo
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineFaultError, EngineLostError

WAIT_S = 60.0
SSE = "text/event-stream; charset=utf-8"


class Replica:
    """As EngineReplica, but with an application of ours and without Ray: its calls are tasks here.

    Attributes:
        produced: pieces that `/endless` has made. came, left: paths whose handler began; that ended before its answer.
    """

    def __init__(self) -> None:
        self.lines = Lines("r1", lambda: Room(8, 4096))
        self.produced = 0
        self.came: list[str] = []
        self.left: list[str] = []
        self.calls: list[asyncio.Task[None]] = []
        self.dialled: set[int] = set()
        self.app = self._application()

    def call(self, reply: ReplyTo) -> "asyncio.Task[None]":
        self.calls.append(asyncio.ensure_future(self.lines.serve(reply, self._answer)))
        return self.calls[-1]

    async def _answer(self, asked: Asked, line: Line) -> None:
        self.dialled.add(id(line))
        await asgi_bridge.run(self.app, asgi_bridge.scope(asked.method, asked.path, asked.headers), line)

    def _application(self) -> Starlette:
        async def echo(request: Request) -> Response:
            body = await request.body()
            return JSONResponse({"bytes": len(body), "sum": sum(body), "id": request.headers.get("x-request-id")}, 201)

        async def events(_: Request) -> Response:
            async def some() -> AsyncIterator[str]:
                for number in range(50):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0)

            return StreamingResponse(some(), media_type="text/event-stream")

        async def endless(_: Request) -> Response:
            async def pieces() -> AsyncIterator[bytes]:
                self.came.append("/endless")
                try:
                    while True:
                        self.produced += 1
                        yield b"x" * 10_000
                        await asyncio.sleep(0)
                finally:
                    self.left.append("/endless")

            return StreamingResponse(pieces(), media_type="text/event-stream")

        async def quiet(_: Request) -> Response:
            self.came.append("/quiet")
            try:
                await asyncio.sleep(60)
            finally:
                self.left.append("/quiet")
            return Response()

        async def lost(_: Request) -> Response:
            raise EngineLostError("its worker was killed")

        async def broken(_: Request) -> Response:
            raise EngineFaultError("a fault of its own")

        handlers = {
            "/echo": echo, "/events": events, "/endless": endless, "/quiet": quiet, "/lost": lost, "/broken": broken,
        }  # fmt: skip
        return Starlette(routes=[Route(path, handler, methods=["POST"]) for path, handler in handlers.items()])


class Both:
    """An ingress's answers and a replica that answers there."""

    def __init__(self) -> None:
        self.answers, self.replica = Answers("127.0.0.1"), Replica()

    def ask(self, path: str, body: bytes = b"", **how: Any) -> Answer:
        return self.answers.ask(self.replica.call, Asked("POST", path, (("x-request-id", "r1"),)), body, **how)


def played(scene: Callable[[Both], Coroutine[Any, Any, Any]]) -> Any:
    async def play() -> Any:
        both = Both()
        await both.answers.start()
        try:
            async with asyncio.timeout(WAIT_S):
                return await scene(both)
        finally:
            await both.answers.close()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # which is what Serve runs replicas on
        return runner.run(play())


async def whole(answer: Answer) -> tuple[Head, bytes]:
    accepted, head = await anext(answer), await anext(answer)
    assert isinstance(accepted, Accepted)
    assert isinstance(head, Head)
    return head, b"".join([piece async for piece in answer if isinstance(piece, bytes)])


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
def test_a_request_of_any_size_is_answered(size: int) -> None:
    async def scene(both: Both) -> tuple[Head, bytes]:
        return await whole(both.ask("/echo", bytes(range(256)) * (size // 256) + bytes(size % 256)))

    head, body = played(scene)
    assert head == Head(201, "application/json")
    expected = {"bytes": size, "sum": size // 256 * sum(range(256)), "id": "r1"}
    assert json.loads(body) == expected


def test_streams_arrive_whole_side_by_side_and_lines_serve_again() -> None:
    expected = "".join(f"data: {number}\n\n" for number in range(50)).encode()

    async def scene(both: Both) -> list[int]:
        counts = []
        for _ in range(3):
            answers = await asyncio.gather(*(whole(both.ask("/events")) for _ in range(20)))
            assert answers == [(Head(200, SSE), expected)] * 20
            await asyncio.gather(*both.replica.calls)
            counts.append(len(both.replica.dialled))
        return counts

    assert played(scene) == [20, 20, 20]


def test_an_answer_that_nobody_reads_waits_and_others_do_not() -> None:
    async def scene(both: Both) -> None:
        slow = both.ask("/endless")
        await anext(slow)
        produced = -1
        while produced != both.replica.produced:
            produced = both.replica.produced
            for _ in range(5):
                await whole(both.ask("/events"))
        kept = sum(len(item) for item in slow._came if isinstance(item, bytes))
        assert MOST_WAITING < kept < 2 * MOST_WAITING
        assert produced * 10_000 < 8 * MOST_WAITING, (
            "as much again lies in the system's buffers, twice, and in asyncio's"
        )
        read = 0
        while read < 40 * MOST_WAITING:
            item = await anext(slow)
            read += len(item) if isinstance(item, bytes) else 0
        assert both.replica.produced > produced, "read on, it goes on"
        slow.cancel()
        await until(lambda: both.replica.left == ["/endless"])

    played(scene)


@pytest.mark.parametrize("path", ["/endless", "/quiet"])
def test_who_leaves_ends_the_handler_and_the_call(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_bridge, "LEAVE_S", 0.05)

    async def scene(both: Both) -> None:
        answer = both.ask(path)
        await until(lambda: both.replica.came == [path])
        answer.cancel()
        await until(lambda: both.replica.left == [path])
        await asyncio.wait(both.replica.calls)
        assert all(call.done() for call in both.replica.calls)
        await until(lambda: not both.answers.lines)

    played(scene)


def test_who_leaves_before_a_replica_has_it_is_not_served() -> None:
    async def scene(both: Both) -> None:
        replies: list[ReplyTo] = []

        def later(reply: ReplyTo) -> "asyncio.Future[None]":
            replies.append(reply)
            return asyncio.get_running_loop().create_future()

        answer = both.answers.ask(later, Asked("POST", "/echo"), b"")
        answer.cancel()
        await both.replica.call(replies[0])  # ends at once: its ticket is nobody's
        with pytest.raises(StopAsyncIteration):
            await anext(answer)

    played(scene)


@pytest.mark.parametrize(("path", "error"), [("/lost", EngineLostError), ("/broken", EngineFaultError)])
def test_the_reason_of_a_loss_arrives_and_the_line_serves_again(path: str, error: type[Exception]) -> None:
    async def scene(both: Both) -> str:
        answer = both.ask(path)
        with pytest.raises(error) as caught:
            await whole(answer)
        await asyncio.gather(*both.replica.calls)
        await whole(both.ask("/echo"))
        assert len(both.replica.dialled) == 1
        return str(caught.value)

    assert played(scene) == ("its worker was killed" if path == "/lost" else "a fault of its own")


def test_a_replica_that_is_gone_cuts_its_answers_behind_what_came() -> None:
    async def scene(both: Both) -> None:
        answer = both.ask("/quiet")
        assert isinstance(await anext(answer), Accepted)
        (line,) = both.replica.lines._used
        line._stream.send(frame(Kind.PIECE, b"last"))
        line._stream.close()
        assert await anext(answer) == b"last"
        with pytest.raises(CutError):
            await anext(answer)

    played(scene)


def test_what_the_call_raises_ends_the_answer_but_not_before_the_reason_on_the_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers_module, "LAST_WORD_S", 0.3)

    async def scene(both: Both) -> None:
        async def refused() -> None:
            raise ActorDiedError

        answer = both.answers.ask(lambda _: asyncio.ensure_future(refused()), Asked("POST", "/echo"), b"")
        with pytest.raises(ActorDiedError):
            await anext(answer)

        async def died(reply: ReplyTo) -> None:
            line = await both.replica.lines.take(reply)
            await line.begin(reply.ticket, "r1")
            asyncio.get_running_loop().call_later(0.1, line._stream.send, frame(Kind.LOST, b"out of memory"))
            raise ActorDiedError

        answer = both.answers.ask(lambda reply: asyncio.ensure_future(died(reply)), Asked("POST", "/echo"), b"")
        await anext(answer)
        with pytest.raises(EngineLostError, match="out of memory"):
            await anext(answer)

    played(scene)


def hurry(monkeypatch: pytest.MonkeyPatch, silence_s: float) -> None:
    """Signs of life come and are looked for more often, and are missed after so long."""
    monkeypatch.setattr(heartbeat, "SILENCE_S", silence_s)
    monkeypatch.setattr(answers_module, "LOOK_S", 0.05)
    monkeypatch.setattr(answering, "BEAT_S", 0.1)


def test_a_replica_that_falls_silent_is_given_up_and_one_that_beats_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 1.0)

    async def scene(both: Both) -> None:
        beating = both.ask("/quiet")
        await anext(beating)
        late = asyncio.ensure_future(anext(beating))
        await asyncio.sleep(2.5)
        assert not late.done()
        assert both.replica.lines._beating is not None
        both.replica.lines._beating.cancel()
        with pytest.raises(SilentError):
            await late
        nobody = both.answers.ask(lambda _: asyncio.get_running_loop().create_future(), Asked("POST", "/"), b"")
        with pytest.raises(SilentError):
            await anext(nobody)

    played(scene)


def test_a_reader_that_takes_its_time_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 0.5)

    async def scene(both: Both) -> None:
        slow = both.ask("/endless")
        await anext(slow)
        await until(lambda: slow._paused)
        await asyncio.sleep(1.5)
        read = 0
        while read < 4 * MOST_WAITING:
            item = await anext(slow)
            read += len(item) if isinstance(item, bytes) else 0
        slow.cancel()

    played(scene)


def test_an_endpoint_that_cannot_be_reached_is_named() -> None:
    async def scene(both: Both) -> None:
        nowhere = ReplyTo("127.0.0.1", 1, bytes(KEY_BYTES), bytes(16))
        with pytest.raises(LineError, match=r"the endpoint at 127\.0\.0\.1:1 cannot be reached: "):
            await both.replica.lines.take(nowhere)

    played(scene)


def test_a_patient_request_waits_for_its_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 0.2)

    async def scene(both: Both) -> tuple[Head, bytes]:
        async def woken(reply: ReplyTo) -> None:
            await asyncio.sleep(1)
            await both.replica.call(reply)

        call = lambda reply: asyncio.ensure_future(woken(reply))  # noqa: E731
        return await whole(both.answers.ask(call, Asked("POST", "/echo"), b"", patient=True))

    assert played(scene)[0].status == 201


@pytest.mark.parametrize("says", ["nothing", "noise", "another secret", "another ticket"])
def test_strangers_get_nothing(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "ADMIT_S", 0.3)

    async def scene(both: Both) -> None:
        answer = both.answers.ask(lambda _: asyncio.get_running_loop().create_future(), Asked("POST", "/"), b"secret")
        gone = asyncio.Event()
        secret = both.answers.secret if says == "another ticket" else bytes(KEY_BYTES)
        heard: list[bytes] = []
        stream = SealedStream(secret, End.DIALLED, heard.append, gone.set)
        await dial(stream, "127.0.0.1", both.answers._port)
        if says == "noise":
            assert stream._transport is not None
            stream._transport.write(bytes(1000))
        elif says != "nothing":
            stream.send(frame(Kind.BEGUN, bytes(16)))
        await gone.wait()
        assert heard == []
        assert not answer.begun
        assert await whole(both.ask("/echo"))

    played(scene)
