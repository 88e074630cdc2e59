"""A running endpoint as a batch's engine: real HTTP, an endpoint that is away for a while, one that is none."""

import asyncio
import json
import socket
from typing import Any

import pytest
from endpoint_stub import Stub, serving
from starlette.responses import JSONResponse, PlainTextResponse

from pomarium.cluster.batch import http_engine
from pomarium.cluster.batch.http_engine import EndpointError, HttpEngine
from pomarium.cluster.batch.lines import Answer, Request

ASKED = Request(1, "r1", "/v1/completions", b'{"prompt": "a"}')


def ask(url: str, key: str | None = None, **patience: float) -> Answer:
    async def run() -> Answer:
        engine = HttpEngine(url, key, **patience)  # type: ignore[arg-type]
        try:
            await engine.start()
            return await engine.answer(ASKED)
        finally:
            await engine.close()

    return asyncio.run(run())


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_engine, "PAUSES_S", (0.01, 0.02))


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_the_answer_is_the_endpoints(ending: str) -> None:
    stub = Stub()
    with serving(stub) as url:
        answer = ask(url + ending, "secret")
    assert (answer.status, json.loads(answer.body)) == (200, {"id": "cmpl-1", "got": {"prompt": "a"}})
    assert stub.keys == ["Bearer secret"]


def test_an_endpoint_that_is_away_is_asked_again() -> None:
    away: list[Any] = [JSONResponse({"error": {}}, status) for status in (503, 429, 502)]
    with serving(Stub(*away)) as url:
        assert ask(url).status == 200


def test_one_that_is_busy_is_asked_again_however_often_and_when_it_says() -> None:
    busy = [JSONResponse({"error": {}}, 429, headers={"Retry-After": "0"}) for _ in range(50)]
    with serving(Stub(*busy)) as url:
        assert ask(url, outage_s=0.0).status == 200


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("3", 3.0),
        ("0", 0.0),
        ("1e9", http_engine.LONGEST_BUSY_S),
        (None, 0.5),
        ("-1", 0.0),
        ("nan", 0.5),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0.5),
    ],
)
def test_how_long_a_busy_one_is_left_alone(retry_after: str | None, seconds: float) -> None:
    assert http_engine.busy_s(retry_after, 0.5) == seconds


def test_a_refusal_is_an_answer() -> None:
    with serving(Stub(JSONResponse({"error": {"message": "too long"}}, 400))) as url:
        answer = ask(url)
    assert (answer.status, json.loads(answer.body)["error"]["message"]) == (400, "too long")


def test_what_is_no_json_is_quoted() -> None:
    with serving(Stub(PlainTextResponse("<html>", 404))) as url:
        answer = ask(url)
    assert json.loads(answer.body)["error"] == {"message": "<html>", "type": "server_error", "code": 404}


def test_one_that_stays_away_ends_the_job_with_what_was_seen() -> None:
    with (
        serving(Stub(*(JSONResponse({"error": {}}, 503) for _ in range(100)))) as url,
        pytest.raises(EndpointError, match=r"503 .*--resume"),
    ):
        ask(url, outage_s=0.05)


def test_none_at_all_is_said_at_once() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(EndpointError, match="No endpoint answers"):
        ask(f"http://127.0.0.1:{port}")
