"""Requests before a model's engines: over real sockets to a replica that answers when a test says so."""

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pomarium.cluster.endpoint import ledger
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.gate import Asker, Gate, Meter
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.ledger import Entry, What
from pomarium.cluster.endpoint.reading import PICTURE_TOKENS, tokens_of
from pomarium.cluster.endpoint.turns import Supply
from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.asgi import Message
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.http.room import Room
from pomarium.cluster.replica.answering import Lines
from pomarium.cluster.replica.serve_plan import Queue
from tests.unit.endpoint.test_answers import Both, Replica, hurry, played, until

_numbers = itertools.count()


class Gated(Replica):
    """Attributes:
    room: that it tells. order: names of the requests that came to it. asked: those that it has not answered.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.room = Room(slots, 4096)
        self.lines = Lines("r1", lambda: self.room)
        self.order: list[str] = []
        self.asked: dict[str, asyncio.Event] = {}

    def _application(self) -> Starlette:
        async def complete(request: Request) -> Response:
            fields = await request.json()
            name = fields["prompt"]
            self.order.append(name)
            answered = self.asked[name] = asyncio.Event()
            if not fields.get("stream"):
                try:
                    await answered.wait()
                finally:
                    del self.asked[name]
                return JSONResponse({"name": name})

            async def events() -> AsyncIterator[str]:
                try:
                    yield f"data: {name}\n\n"
                    await answered.wait()
                    yield "data: [DONE]\n\n"
                finally:
                    del self.asked[name]

            return StreamingResponse(events(), media_type="text/event-stream")

        paths = ("/v1/completions", "/v1/messages", "/tokenize")
        return Starlette(routes=[Route(path, complete, methods=["POST"]) for path in paths])


class Asked:
    """A request of a client on its way."""

    def __init__(
        self, ingress: Ingress, name: str, at: str, address: str, fields: Any, headers: dict[str, str]
    ) -> None:
        self.sent: list[Message] = []
        self._left = asyncio.Event()
        self._body = json.dumps({"prompt": name, **fields}).encode()
        scope = asgi_bridge.scope("POST", at, list(headers.items())) | {"client": (address, 1)}
        self.task = asyncio.ensure_future(self._asked(ingress, scope))

    async def _asked(self, ingress: Ingress, scope: Message) -> None:
        with contextlib.suppress(ClientDisconnect):  # what it ends with for a client that left in the middle
            await ingress(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body:
            body, self._body = self._body, b""
            return {"type": "http.request", "body": body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self._left.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()


class Scene:
    """An ingress of the model `m`, its one replica, and what the meter was told."""

    def __init__(self, both: Both, slots: int, queue: Queue, keys: frozenset[str]) -> None:
        self.replica = both.replica = Gated(slots)
        self.refused: list[str] = []
        self.waiting = 0
        self.deployment = f"engine:gated-{next(_numbers)}"
        self.ledger = ledger.of_this_process()
        self.ledger.keep(self.deployment, ["r1"])
        self.ledger.told("r1", self.replica.room)
        both.answers.told = self.ledger.told
        meter = Meter(self.refused.append, self._tell)

        async def listen() -> Any:
            return both.answers

        handle: Any = Handle(self.deployment, both.replica.call)
        served = {"m": Served("m", 8, queue=queue)}
        self.ingress = Ingress({"m": handle}, keys, served=served, listen=listen, meter=lambda name: meter)

    def _tell(self, requests: int, tokens: int) -> None:
        self.waiting = requests
        assert (requests == 0) == (tokens == 0)

    def ask(
        self, name: str, address: str = "a", at: str = "/v1/completions", headers: Any = None, **fields: Any
    ) -> Asked:
        return Asked(self.ingress, name, at, address, fields, headers or {})

    async def came(self, count: int) -> None:
        await until(lambda: len(self.replica.order) == count)

    async def waits(self, count: int) -> None:
        await until(lambda: self.waiting == count)

    async def answer(self, name: str) -> None:
        await until(lambda: name in self.replica.asked)
        self.replica.asked[name].set()


class Handle:
    def __init__(self, name: str, call: Callable[..., Any]) -> None:
        self.deployment_name = name
        self.request = self
        self._call = call

    def remote(self, _: Any, reply: Any) -> Any:
        return self._call(reply)


def scene(
    play: Callable[[Scene], Awaitable[None]],
    slots: int = 1,
    queue: Queue = Queue(),  # noqa: B008 # frozen
    keys: frozenset[str] = frozenset(),
) -> None:
    async def with_both(both: Both) -> None:
        await play(Scene(both, slots, queue, keys))

    played(with_both)


def test_what_finds_no_slot_waits_and_what_is_too_much_is_refused_at_once() -> None:
    async def play(scene: Scene) -> None:
        asked = [scene.ask(name) for name in "abcd"]
        await scene.came(1)
        await scene.waits(2)
        await asked[3].task
        assert (asked[3].status, scene.refused) == (429, ["full"])
        assert int(asked[3].headers["retry-after"]) >= 1
        assert json.loads(asked[3].text)["error"]["type"] == "RateLimitError"
        other = scene.ask("e", at="/v1/messages")
        await other.task
        assert json.loads(other.text)["error"]["type"] == "rate_limit_error"
        for number, name in enumerate("abc", 1):
            await scene.answer(name)
            await asked[number - 1].task
            assert (asked[number - 1].status, json.loads(asked[number - 1].text)) == (200, {"name": name})
        assert scene.replica.order == ["a", "b", "c"]
        assert scene.waiting == 0

    scene(play, queue=Queue(requests=2))


def test_clients_take_turns() -> None:
    async def play(scene: Scene) -> None:
        many = [scene.ask(f"a{number}", "a") for number in range(20)]
        await scene.came(1)
        await scene.waits(19)
        one = scene.ask("b", "b")
        await scene.waits(20)
        for name in ("a0", "a1"):
            await scene.answer(name)
        await scene.answer("b")
        await one.task
        assert (one.status, scene.replica.order.index("b")) == (200, 2)
        for asked in many:
            asked.leave()
        await asyncio.gather(*(asked.task for asked in many))

    scene(play)


@pytest.mark.parametrize(
    ("keys", "headers", "order"),
    [
        (frozenset({"k1", "k2"}), ["k1", "k1", "k1", "k2"], [0, 1, 3, 2]),
        (frozenset({"k1"}), ["k1", "k1", "k1", "k1"], [0, 1, 2, 3]),
        (frozenset(), ["x", "x", "x", "y"], [0, 1, 3, 2]),
    ],
)
def test_clients_of_one_address_are_told_apart_by_their_keys(
    keys: frozenset[str], headers: list[str], order: list[int]
) -> None:
    async def play(scene: Scene) -> None:
        asked = [scene.ask("0", headers={"Authorization": f"Bearer {headers[0]}"})]
        await scene.came(1)
        for number in (1, 2, 3):
            asked.append(scene.ask(str(number), headers={"Authorization": f"Bearer {headers[number]}"}))
            await scene.waits(number)
        for number in order:
            await scene.answer(str(number))
            await asked[number].task
        assert scene.replica.order == [str(number) for number in order]

    scene(play, keys=keys)


def test_who_leaves_while_waiting_or_being_answered_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 30.0)

    async def play(scene: Scene) -> None:
        runs, waits, stays = scene.ask("a", stream=True), scene.ask("b"), scene.ask("c")
        await scene.came(1)
        await scene.waits(2)
        waits.leave()
        await waits.task
        await scene.waits(1)
        runs.leave()
        await runs.task
        await scene.answer("c")
        await stays.task
        await until(lambda: not scene.replica.asked)
        assert (stays.status, scene.replica.order) == (200, ["a", "c"])

    scene(play)


def test_a_deadline_in_the_queue_and_in_an_answer() -> None:
    async def play(scene: Scene) -> None:
        runs = scene.ask("a")
        await scene.came(1)
        late = [scene.ask("b", headers={"X-Request-Timeout": "0.2"}), scene.ask("c", timeout=0.2)]
        for asked in late:
            await asked.task
            assert (asked.status, asked.headers["x-should-retry"]) == (408, "false")
            assert "within the 0.2 s" in json.loads(asked.text)["error"]["message"]
        assert (scene.refused, scene.waiting) == (["late", "late"], 0)
        await scene.answer("a")
        await runs.task
        whole, streams = scene.ask("d", timeout=0.5), None
        await whole.task
        assert whole.status == 408
        streams = scene.ask("e", stream=True, timeout=0.5)
        await streams.task
        first, last, done = streams.text.strip().split("\n\n")
        assert (streams.status, first, done) == (200, "data: e", "data: [DONE]")
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == 408
        await until(lambda: not scene.replica.asked)
        assert scene.replica.order == ["a", "d", "e"]

    scene(play)


def test_who_says_nothing_has_the_time_that_is_set() -> None:
    async def play(scene: Scene) -> None:
        own, longer = scene.ask("a"), scene.ask("b", timeout=60)
        await own.task
        assert own.status == 408
        await scene.answer("b")
        await longer.task
        assert longer.status == 200

    scene(play, slots=2, queue=Queue(timeout_s=0.3))


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_a_400(value: str) -> None:
    async def play(scene: Scene) -> None:
        asked = scene.ask("a", headers={"X-Request-Timeout": value})
        await asked.task
        assert (asked.status, json.loads(asked.text)["error"]["param"]) == (400, "X-Request-Timeout")
        wrong = scene.ask("a", timeout="soon")
        await wrong.task
        assert (wrong.status, json.loads(wrong.text)["error"]["param"]) == (400, "timeout")

    scene(play)


def test_batches_let_people_go_first_and_go_on() -> None:
    async def play(scene: Scene) -> None:
        yields = {"X-Pomarium-Priority": "batch"}
        batch = [scene.ask(f"b{number}", headers=yields) for number in range(4)]
        await scene.came(2)
        await scene.waits(2)
        people = [scene.ask("p0"), scene.ask("p1")]
        await scene.came(3)
        assert scene.replica.order[2] == "p0", "half is theirs, whatever a batch has"
        await scene.waits(3)
        await scene.answer("b0")
        await scene.answer("b1")
        await scene.came(4)
        assert scene.replica.order[3] == "p1"
        for name in ("p0", "p1", "b2", "b3"):
            await scene.answer(name)
        for asked in [*batch, *people]:
            await asked.task
            assert asked.status == 200

    scene(play, slots=2)


def test_another_ingress_uses_its_share_and_what_is_free() -> None:
    async def play(scene: Scene) -> None:
        for _ in range(4):
            scene.ledger.hear("other", Entry(What.SENT, scene.deployment, "r1"))
        asked = [scene.ask(name) for name in "abc"]
        await scene.came(2)
        await scene.waits(1)
        scene.ledger.gone("other")
        await scene.came(3)
        for name, each in zip("abc", asked, strict=True):
            await scene.answer(name)
            await each.task

    scene(play, slots=4)


def test_a_replica_s_room_is_heard_and_the_lack_of_any_holds_nobody() -> None:
    async def play(scene: Scene) -> None:
        first, second = scene.ask("a"), scene.ask("b")
        await scene.came(1)
        await scene.waits(1)
        scene.replica.room = Room(2, 4096)
        await scene.came(2)
        third = scene.ask("c")
        await scene.waits(1)
        scene.ledger.keep(scene.deployment, [])
        await scene.came(3)
        for name, asked in zip("abc", (first, second, third), strict=True):
            await scene.answer(name)
            await asked.task
            assert asked.status == 200

    scene(play)


def test_who_waits_when_the_endpoint_ends_is_told() -> None:
    async def play(scene: Scene) -> None:
        runs, waits = scene.ask("a"), scene.ask("b")
        await scene.came(1)
        await scene.waits(1)
        scene.ingress.end()
        late = scene.ask("c")
        for asked in (waits, late, runs):
            await asked.task
            assert (asked.status, "being stopped" in asked.text) == (503, True)
        assert (scene.replica.order, scene.waiting) == (["a"], 0)

    scene(play)


def test_a_picture_counts_as_one_whatever_its_size() -> None:
    words = "what is this? " * 100
    assert tokens_of(words) == len(words) / 4
    assert tokens_of(words + "QUJD" * 1_000_000) == len(words) / 4 + PICTURE_TOKENS


def test_what_computes_no_prompt_does_not_wait() -> None:
    async def play(scene: Scene) -> None:
        runs, counts = scene.ask("a"), scene.ask("t", at="/tokenize")
        await scene.came(2)
        await scene.answer("t")
        await counts.task
        await scene.answer("a")
        await runs.task
        assert (runs.status, counts.status) == (200, 200)

    scene(play)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_no_slot_is_lost_or_given_twice_whoever_leaves_when(seed: int, slots: int) -> None:
    chance = Random(seed)
    running = most = 0

    async def client(gate: Gate, name: str) -> None:
        nonlocal running, most
        left = asyncio.Event()

        async def receive() -> Message:
            await left.wait()
            return {"type": "http.disconnect"}

        asyncio.get_running_loop().call_later(0.01 * chance.random(), left.set)
        with contextlib.suppress(ClientDisconnect, RefusalError, TimeoutError):
            async with asyncio.timeout(0.01 * chance.random()):
                async with gate.turn(Asker(name, 1, batch=chance.random() < 0.3), receive):
                    running += 1
                    most = max(most, running)
                    try:
                        await asyncio.sleep(0.003 * chance.random())
                    finally:
                        running -= 1

    async def play() -> None:
        gate = Gate("m", Queue(requests=20), lambda: Supply(slots), Meter())
        clients = []
        for _ in range(60):
            clients.append(asyncio.create_task(client(gate, chance.choice("abc"))))
            if chance.random() < 0.2:
                await asyncio.sleep(0.001)
        await asyncio.gather(*clients)
        assert (gate.waiting, running) == (0, 0)
        for _ in range(slots):  # all of them are there to be had
            turn = gate.turn(Asker("a", 1), asyncio.Event().wait)  # type: ignore[arg-type]
            async with asyncio.timeout(60):
                await turn.__aenter__()

    asyncio.run(play())
    assert most <= slots + max(1, slots // 2), "a batch that has everything gives way to people"
