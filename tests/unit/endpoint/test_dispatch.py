"""Requests over lines that a replica keeps open: who is chosen, what the ledger knows, and what becomes of them when
the line or the replica fails. Over real sockets; test_answers.py has the two ends."""

import asyncio
from random import Random
from typing import Any

import pytest

from pomarium.cluster.endpoint import ledger as ledger_module
from pomarium.cluster.endpoint.answers import MOST_IDLE, Accepted, Answer
from pomarium.cluster.endpoint.dispatch import dispatch
from pomarium.cluster.endpoint.ledger import Ledger
from pomarium.cluster.http import asgi_bridge
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.replica.answering import Line, ReplyTo
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineLostError
from tests.unit.endpoint.test_answers import Both, hurry, played, until, whole

ENGINE = "engine:m"
KEYS = (1, 2, 3)


class Endpoint(Both):
    """An ingress that sends requests over lines where it can, and what it knows."""

    def __init__(self, both: Both) -> None:
        self.answers, self.replica = both.answers, both.replica
        self.now = 100.0
        self.ledger = Ledger(lambda: self.now)
        self.ledger.keep(ENGINE, ["r1"])
        self.answers.lost = self.ledger.lost

    def ask(self, path: str, body: bytes = b"", **how: Any) -> Answer:
        over = dispatch(self.ledger, self.answers, ENGINE, KEYS, Random(0))
        return super().ask(path, body, keeps=True, over=over, **how)

    @property
    def calls(self) -> int:
        """How many requests were called."""
        return len(self.replica.calls)

    async def kept(self, count: int) -> list[Line]:
        """The replica's ends of its lines that wait, once there are so many."""
        await until(lambda: len(self.replica.lines._kept) == count and not self.replica.lines._used)
        return list(self.replica.lines._kept.values())

    def known(self) -> tuple[int, int]:
        """Of the replica: requests that are not over, and leading keys that it has read."""
        (candidate,) = self.ledger.candidates(ENGINE, ["r1"], KEYS)
        return candidate.load, candidate.matched


def scene(play: Any) -> None:
    async def with_both(both: Both) -> None:
        await play(Endpoint(both))

    played(with_both)


def test_the_first_request_is_called_and_later_ones_go_over_its_line() -> None:
    async def play(endpoint: Endpoint) -> None:
        for size in (0, 10, 70_000, 3_000_000):
            head, _ = await whole(endpoint.ask("/echo", bytes(size)))
            assert head.status == 201
        assert (endpoint.calls, len(endpoint.replica.dialled)) == (1, 1)
        assert endpoint.known() == (0, len(KEYS))
        await asyncio.gather(*(whole(endpoint.ask("/events")) for _ in range(20)))
        assert endpoint.calls == len(endpoint.replica.dialled) == 20, "a line has one request at a time"
        await asyncio.gather(*(whole(endpoint.ask("/events")) for _ in range(20)))
        assert endpoint.calls == 20
        assert endpoint.known() == (0, len(KEYS))

    scene(play)


def test_what_is_under_way_counts_as_load_until_it_ends_or_its_client_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi_bridge, "LEAVE_S", 0.05)

    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        stays = endpoint.ask("/quiet")
        assert isinstance(await anext(stays), Accepted)
        assert (endpoint.calls, endpoint.known()) == (1, (1, len(KEYS)))
        stays.cancel()
        assert endpoint.known()[0] == 0
        await until(lambda: endpoint.replica.left == ["/quiet"])
        await until(lambda: not endpoint.answers.lines)
        await whole(endpoint.ask("/echo"))
        assert endpoint.calls == 2, "its line has ended with it"

    scene(play)


def test_a_request_whose_line_is_lost_before_it_is_taken_is_called() -> None:
    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        (line,) = await endpoint.kept(1)
        line._stream._received = lambda message: line.close()
        head, body = await whole(endpoint.ask("/echo", b"\x05\x06"))
        assert (head.status, endpoint.calls) == (201, 2)
        assert b'"sum":11' in body
        assert endpoint.known()[0] == 0

    scene(play)


def test_a_replica_that_drains_answers_what_it_has_and_sends_the_rest_elsewhere() -> None:
    async def play(endpoint: Endpoint) -> None:
        await asyncio.gather(*(whole(endpoint.ask("/events")) for _ in range(3)))
        await endpoint.kept(3)
        busy = endpoint.ask("/events")
        assert isinstance(await anext(busy), Accepted)
        draining = asyncio.ensure_future(endpoint.replica.lines.drain())
        await asyncio.sleep(0)
        late = endpoint.ask("/echo")
        assert len(b"".join([item async for item in busy if isinstance(item, bytes)])) > 0
        await draining
        assert (await whole(late))[0].status == 201
        assert endpoint.calls == 4, "Serve finds another replica for it"
        assert not endpoint.replica.lines._kept

    scene(play)


def test_a_replica_that_owes_a_sign_gets_no_more_over_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch, 0.5)

    async def play(endpoint: Endpoint) -> None:
        await asyncio.gather(*(whole(endpoint.ask("/events")) for _ in range(3)))
        for line in await endpoint.kept(3):
            line._stream._received = lambda message: None  # it is frozen
        silent = endpoint.ask("/echo")
        endpoint.now += ledger_module.SILENT_S + 0.1
        assert dispatch(endpoint.ledger, endpoint.answers, ENGINE, KEYS, Random(0)) is None
        with pytest.raises(SilentError):
            await whole(silent)
        assert endpoint.known()[0] == 0

    scene(play)


def test_the_reason_of_a_loss_comes_over_a_kept_line_too() -> None:
    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        with pytest.raises(EngineLostError, match="its worker was killed"):
            await whole(endpoint.ask("/lost"))
        assert [known.silent for known in endpoint.ledger.candidates(ENGINE, ["r1"], ())] == [True], "others come first"
        assert dispatch(endpoint.ledger, endpoint.answers, ENGINE, KEYS, Random(0)) is None
        endpoint.now += ledger_module.SILENT_NO_MORE_S
        assert [known.silent for known in endpoint.ledger.candidates(ENGINE, ["r1"], ())] == [False]

    scene(play)


@pytest.mark.parametrize(("after_s", "silent"), [(0.1, False), (ledger_module.SILENT_S + 0.1, True)])
def test_a_client_that_leaves_before_a_replica_had_time_says_nothing_of_it(after_s: float, silent: bool) -> None:
    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        for line in await endpoint.kept(1):
            line._stream._received = lambda message: None
        leaves = endpoint.ask("/echo")
        endpoint.now += after_s
        leaves.cancel()
        endpoint.now += 2.0
        assert [known.silent for known in endpoint.ledger.candidates(ENGINE, ["r1"], ())] == [silent]

    scene(play)


def test_no_more_lines_are_kept_than_are_of_use() -> None:
    async def play(endpoint: Endpoint) -> None:
        await asyncio.gather(*(whole(endpoint.ask("/events")) for _ in range(MOST_IDLE + 5)))
        await until(lambda: len(endpoint.answers.lines) == MOST_IDLE)
        await endpoint.kept(MOST_IDLE)

    scene(play)


def test_requests_go_where_the_prompt_is_known_and_to_replicas_that_run() -> None:
    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        endpoint.ledger.keep(ENGINE, [])
        assert dispatch(endpoint.ledger, endpoint.answers, ENGINE, KEYS, Random(0)) is None, "it runs no more"
        endpoint.ledger.keep(ENGINE, ["r1", "r2"])
        found = dispatch(endpoint.ledger, endpoint.answers, ENGINE, (), Random(0))
        if found is not None:
            assert found.line.replica == "r1", "r2 has no line here"
            found.over()

    scene(play)


def test_a_replica_whose_endpoint_ends_keeps_no_line() -> None:
    async def play(endpoint: Endpoint) -> None:
        await whole(endpoint.ask("/echo"))
        await endpoint.kept(1)
        await endpoint.answers.close()
        await endpoint.kept(0)
        await until(lambda: not endpoint.answers._idle)

    scene(play)


def test_a_call_that_comes_by_itself_is_not_kept() -> None:
    async def play(endpoint: Endpoint) -> None:
        seen: list[ReplyTo] = []

        def call(reply: ReplyTo) -> Any:
            seen.append(reply)
            return endpoint.replica.call(reply)

        await whole(endpoint.answers.ask(call, Asked("POST", "/echo"), b""))
        assert (seen[0].keeps, endpoint.replica.lines._kept) == (False, {})
        assert endpoint.answers.idle("r1") is None

    scene(play)
