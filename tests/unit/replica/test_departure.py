"""An engine whose Mac is drained: what it takes, what it leaves to others, and when it goes."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import RaySystemError

from pomarium.cluster.rack import drains
from pomarium.cluster.rack.drains import Drain
from pomarium.cluster.replica import departure
from pomarium.cluster.replica.departure import Departure
from pomarium.cluster.replica.loss import EngineGoneError, EngineMovedError

NOW, LATER = 1000.0, 2000.0


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departure, "LOOK_S", 0.001)


class Engine:
    """A departure whose drains and clock are set here."""

    def __init__(self, *told: Drain) -> None:
        self.told: list[Drain] | Exception = list(told)
        self.now = NOW
        self.departure = Departure("r1", ("n1", "n2"), self._read, lambda: self.now)
        self.leaves = asyncio.create_task(self.departure.due())

    def _read(self) -> list[Drain]:
        if isinstance(self.told, Exception):
            raise self.told
        return self.told

    async def noticed(self) -> None:
        while self.departure.drain is None:
            await asyncio.sleep(0.001)


async def answered() -> None:
    await asyncio.sleep(0)


async def endless() -> None:
    await asyncio.get_running_loop().create_future()


async def looked() -> None:
    await asyncio.sleep(0.05)


def test_an_engine_elsewhere_stays() -> None:
    async def play() -> None:
        engine = Engine(Drain("mac-3", "n3"))
        await looked()
        await engine.departure.attended(answered())
        assert not engine.leaves.done()

    asyncio.run(play())


def test_one_that_is_spared_stays_until_it_is_not() -> None:
    async def play() -> None:
        engine = Engine(Drain("mac-1", "n1", spared=("r2", "r1")))
        await looked()
        await engine.departure.attended(answered())
        assert not engine.leaves.done()
        engine.told = [Drain("mac-1", "n1", spared=("r2",))]
        assert (await engine.leaves).mac == "mac-1"

    asyncio.run(play())


def test_what_runs_is_moved_at_once_and_then_it_goes() -> None:
    async def play() -> None:
        engine = Engine()
        running = asyncio.create_task(engine.departure.attended(endless()))
        await looked()
        assert not running.done()
        engine.told = [Drain("mac-2", "n2")]
        with pytest.raises(EngineMovedError, match="mac-2 is being drained"):
            await running
        assert (await engine.leaves).mac == "mac-2"

    asyncio.run(play())


def test_with_time_what_runs_ends_and_nothing_is_begun() -> None:
    async def play() -> None:
        engine = Engine()
        over = asyncio.Event()

        async def whole() -> None:
            await over.wait()

        running = asyncio.create_task(engine.departure.attended(whole()))
        await looked()
        engine.told = [Drain("mac-1", "n1", LATER)]
        await engine.noticed()
        with pytest.raises(EngineGoneError):
            await engine.departure.attended(answered())
        assert not engine.leaves.done()
        over.set()
        await running
        assert (await engine.leaves).until == LATER

    asyncio.run(play())


def test_the_time_has_an_end() -> None:
    async def play() -> None:
        engine = Engine()
        running = asyncio.create_task(engine.departure.attended(endless()))
        await looked()
        engine.told = [Drain("mac-1", "n1", LATER)]
        await engine.noticed()
        engine.now = LATER
        with pytest.raises(EngineMovedError):
            await running

    asyncio.run(play())


def test_a_drain_that_is_taken_back_is_none() -> None:
    async def play() -> None:
        engine = Engine()
        running = asyncio.create_task(engine.departure.attended(endless()))
        await looked()
        engine.told = [Drain("mac-1", "n1", LATER)]
        await engine.noticed()
        engine.told = []
        while engine.departure.drain is not None:
            await asyncio.sleep(0.001)
        await engine.departure.attended(answered())
        assert not running.done()
        assert not engine.leaves.done()
        running.cancel()

    asyncio.run(play())


def test_a_head_that_is_silent_is_asked_again() -> None:
    async def play() -> None:
        engine = Engine()
        engine.told = RaySystemError("no head")
        await looked()
        await engine.departure.attended(answered())
        engine.told = [Drain("mac-1", "n1")]
        assert (await engine.leaves).mac == "mac-1"

    asyncio.run(play())


def test_a_client_that_leaves_ends_its_answer() -> None:
    async def play() -> None:
        engine, ended = Engine(), asyncio.Event()

        async def answer() -> None:
            try:
                await endless()
            finally:
                ended.set()

        running = asyncio.create_task(engine.departure.attended(answer()))
        await looked()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert ended.is_set()
        engine.told = [Drain("mac-1", "n1", LATER)]
        await engine.leaves

    asyncio.run(play())


def test_what_an_answer_raises_is_raised() -> None:
    async def play(answer: Coroutine[Any, Any, None]) -> None:
        await Engine().departure.attended(answer)

    async def failing() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        asyncio.run(play(failing()))


@given(st.builds(Drain, st.text(), st.text(), st.floats(0, 4e9), st.lists(st.text()).map(tuple)))
def test_drains_survive_json(drain: Drain) -> None:
    assert drains.decode(drains.encode(drain)) == drain


def test_the_most_urgent_drain_counts() -> None:
    slow, fast = Drain("a", "n1", LATER), Drain("b", "n2")
    assert drains.of_nodes([slow, fast], ["n1", "n2"]) is fast
    assert drains.of_nodes([slow, fast], ["n1"]) is slow
    assert drains.of_nodes([slow, fast], []) is None
