"""Models on demand, as the ingress keeps them: a Serve that does what it is told, in a moment of its own."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from idle_ingress import Handle
from ray.exceptions import RayError

from pomarium.cluster import faults
from pomarium.cluster.autoscaling.policy import Tries
from pomarium.cluster.endpoint import on_demand
from pomarium.cluster.endpoint.answers import Answers
from pomarium.cluster.endpoint.holding import HopelessError, State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.on_demand import OnDemand, OnDemandModels
from pomarium.cluster.endpoint.residence import Rules

pytestmark = pytest.mark.asyncio

RULES = Rules(10, keep_s=1e6, turn_s=0.2, settle_s=0.05)
MISSING = "Its weights are gone."


class Serve:
    """Serve's controller: what it was told, which engines are there, what it says of those that did not start."""

    def __init__(self) -> None:
        self.told: dict[str, int] = {}
        self.there: dict[str, State] = {}
        self.faulty: set[str] = set()
        self.silent = False
        self.most = 0

    def read(self) -> dict[str, State]:
        if self.silent:
            raise RayError("the controller is gone")
        states = dict(self.there)
        for name, wanted in self.told.items():  # what it is told shows the next time
            said, there = self.there.get(name, State()).message, self.there.get(name, State()).there
            if wanted and name in self.faulty and there:  # it failed, and Serve waits before the next start
                self.there[name] = State(f"A replica failed to start. {faults.StartError(MISSING)}")
            elif wanted and (name in self.faulty or not there):
                self.there[name] = State(said, there=1)  # it goes on to say what was
            else:
                self.there[name] = State(running=1, there=1) if wanted else State(said)
        self.most = max(self.most, sum(state.there for state in self.there.values()))
        return states

    async def scale(self, deployment: str, engines: int) -> None:
        if self.silent:
            raise RayError("the controller is gone")
        self.told[deployment] = engines


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    monkeypatch.setattr(on_demand, "BUSY_LOOK_S", 0.01)
    monkeypatch.setattr(on_demand, "LOOK_S", 0.05)
    return Serve()


@asynccontextmanager
async def kept(serve: Serve, sizes: dict[str, int], pinned: str = "", rules: Rules = RULES) -> AsyncIterator[OnDemand]:
    models = OnDemand(OnDemandModels(sizes, frozenset(pinned), rules), serve.read, serve.scale)
    await models.start()
    assert models._task is not None
    try:
        yield models
        models.check()
    finally:
        models._task.cancel()


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.01)


async def ask(models: OnDemand, name: str, lasts: float = 0.0) -> None:
    async with models.needed(name):
        assert models.state(name).state in ("serving", "leaving")
        await asyncio.sleep(lasts)


async def test_a_request_waits_for_its_model(serve: Serve) -> None:
    async with kept(serve, {"a": 4, "b": 4}) as models:
        assert [models.state(name).state for name in "ab"] == ["asleep", "asleep"]
        await ask(models, "a")
        assert [models.state(name).state for name in "ab"] == ["serving", "asleep"]
        assert serve.told["engine:a"] == 1


async def test_two_that_do_not_fit_take_turns_and_no_answer_is_cut(serve: Serve) -> None:
    async with kept(serve, {"a": 6, "b": 6}) as models:
        async with models.needed("a"):
            waiting = asyncio.create_task(ask(models, "b", 0.05))
            await until(lambda: models.state("b").state == "waiting")
            assert "a" in (models.state("b").reason or "")
            await until(lambda: models.state("a").state == "leaving")
            later = asyncio.create_task(ask(models, "a"))
            await asyncio.sleep(0.3)
            assert serve.told["engine:a"] == 1, "it is answering"
            assert not waiting.done()
            assert not later.done(), "who comes later waits for the other's turn"
        await waiting
        await later
        await asyncio.gather(*(ask(models, name, 0.02) for name in "abba" * 3))
        assert serve.most == 1


async def test_a_client_that_leaves_is_not_waited_for(serve: Serve) -> None:
    async with kept(serve, {"a": 6, "b": 6}) as models, models.needed("a"):
        waiting = asyncio.create_task(ask(models, "b"))
        await until(lambda: models.state("a").state == "leaving")
        waiting.cancel()
        await until(lambda: models.state("a").state == "serving")
        await ask(models, "a")


async def test_who_waits_is_told_that_the_endpoint_ends(serve: Serve) -> None:
    async with kept(serve, {"a": 6, "b": 6}) as models, models.needed("a"):
        waiting = asyncio.create_task(ask(models, "b"))
        await until(lambda: models.state("a").state == "leaving")
        models.end("the endpoint is being stopped")
        with pytest.raises(HopelessError, match="is being stopped"):
            await waiting


async def test_a_start_that_fails_is_told_and_not_tried_at_once(serve: Serve) -> None:
    serve.faulty.add("engine:a")
    async with kept(serve, {"a": 6, "b": 6}) as models:
        with pytest.raises(HopelessError, match=MISSING):
            await ask(models, "a")
        await until(lambda: models.state("a").state == "failed")
        assert models.state("a").reason == MISSING
        with pytest.raises(HopelessError, match=r"Its weights are gone; it is tried again"):
            await ask(models, "a")
        await ask(models, "b")
        assert serve.told["engine:a"] == 0

        models._models["a"].tries = Tries()  # the pause is over
        with pytest.raises(HopelessError, match=MISSING):
            await ask(models, "a")
        serve.faulty.clear()
        models._models["a"].tries = Tries()
        await ask(models, "a")
        assert models.state("a").reason is None


async def test_a_pinned_one_that_fails_is_tried_by_serve_and_asked_again(serve: Serve) -> None:
    serve.faulty.add("engine:a")
    async with kept(serve, {"a": 6}, "a") as models:
        await until(lambda: models.state("a").reason == MISSING)
        with pytest.raises(HopelessError, match=MISSING):
            await ask(models, "a")
        assert serve.told["engine:a"] == 1
        serve.faulty.clear()
        await until(lambda: models.state("a").state == "serving")
        await ask(models, "a")


async def test_what_never_fits_is_said_and_what_is_pinned_is_there(serve: Serve) -> None:
    async with kept(serve, {"a": 4, "b": 7, "c": 6}, "a") as models:
        assert (models.unfit("b") or "").startswith("b takes 7 B and never fits")
        assert models.unfit("c") is None
        assert models.state("b").state == "failed"
        await until(lambda: models.state("a").state == "serving")
        await ask(models, "c")
        await asyncio.sleep(0.1)
        assert [models.state(name).state for name in "ac"] == ["serving", "serving"]


async def test_an_idle_one_leaves(serve: Serve) -> None:
    async with kept(serve, {"a": 4}, rules=Rules(10, keep_s=0.1)) as models:
        await ask(models, "a")
        await until(lambda: models.state("a").state == "asleep")
        await ask(models, "a")


async def test_a_controller_that_is_away_is_told_when_it_is_back(serve: Serve) -> None:
    async with kept(serve, {"a": 4}) as models:
        serve.silent = True
        waiting = asyncio.create_task(ask(models, "a"))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        serve.silent = False
        await waiting


async def test_a_controller_that_knows_nothing_yet_says_nothing_of_models(serve: Serve) -> None:
    async with kept(serve, {"a": 4}) as models:
        await ask(models, "a")
        models._read = dict
        await asyncio.sleep(0.2)
        assert models.state("a").state == "serving"
        models._read = serve.read


async def test_another_ingress_begins_with_what_is_there(serve: Serve) -> None:
    async with kept(serve, {"a": 6, "b": 6}) as models:
        await ask(models, "a")
    async with kept(serve, {"a": 6, "b": 6}) as models:
        assert [models.state(name).state for name in "ab"] == ["serving", "asleep"]
        await ask(models, "a")
        await ask(models, "b")
        assert serve.most == 1


async def test_an_engine_that_is_lost_is_waited_for(serve: Serve) -> None:
    async with kept(serve, {"a": 6}) as models:
        await ask(models, "a")
        serve.told["engine:a"] = 0  # Serve starts another by itself: here, later
        await until(lambda: models.state("a").state == "starting")
        waiting = asyncio.create_task(ask(models, "a"))
        serve.told["engine:a"] = 1
        await waiting


async def test_a_request_for_what_never_fits_is_refused_for_good(serve: Serve) -> None:
    """400, for to try again would not help; the models are listed with their states."""

    async def listen() -> Answers:
        return Answers("127.0.0.1")

    async with kept(serve, {"a": 4, "b": 70}) as models:
        engines: Any = {name: Handle(name) for name in "ab"}
        app = Ingress(engines, listen=listen, on_demand=models, head_answers=lambda: True, shortage=lambda: None)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://pomarium") as client:
            answer = await client.post("/v1/completions", json={"model": "b", "prompt": "x"})
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("b takes 70 B and never fits")
            health = await client.get("/health")
            assert health.status_code == 200, "it was said at the start"
            assert health.json()["models"] == {"a": "asleep", "b": answer.json()["error"]["message"]}
            listed = (await client.get("/v1/models")).json()["data"]
    assert [(model["id"], model["state"]) for model in listed] == [("a", "asleep"), ("b", "failed")]
    assert listed[1]["reason"] == answer.json()["error"]["message"]
