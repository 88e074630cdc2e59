"""More than an endpoint can do, against a running one: who waits, who is refused and when, whose turn it is, and who
leaves when its time is over."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from rack_serving import until
from serve_process import MODEL, Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SLOTS, WAITING = 2, 4
SOON_S = 1.0
"""In which a refusal has to come; where a test holds on a machine with other things to do, the quickest of several."""
LONG_S = 300.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    bounds = ["--max-num-seqs", str(SLOTS), "--max-waiting", str(WAITING), "--max-wait", "10m"]
    server = Server(tmp_path_factory.mktemp("overload"), bounds)
    server.ensure()
    complete(server, 1)  # from then on the ingress knows how many slots there are
    yield server
    server.end()


def complete(server: Server, tokens: int, key: str = "one", **fields: Any) -> httpx.Response:
    """What a client with that key is answered."""
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": True} | fields
    headers = {"Authorization": f"Bearer {key}"} | fields.pop("headers", {})
    body.pop("headers", None)
    return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=LONG_S)


class Crowd:
    """Requests that run for as long as a test wants: streams that it ends."""

    def __init__(self, server: Server) -> None:
        self._server, self._pool = server, ThreadPoolExecutor(64)
        self.open: list[tuple[httpx.Response, Iterator[bytes]]] = []

    def run(self, count: int, key: str = "one") -> None:
        """So many, each of which has its first token."""
        for _ in range(count):
            body = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
            client = httpx.Client(timeout=LONG_S, headers={"Authorization": f"Bearer {key}"})
            response = client.send(
                client.build_request("POST", f"{self._server.url}/v1/completions", json=body), stream=True
            )
            assert response.status_code == 200, response.read()
            pieces = response.iter_raw()
            next(pieces)
            self.open.append((response, pieces))  # the connection ends with either

    def ask(self, tokens: int, key: str = "one", **fields: Any) -> "Future[httpx.Response]":
        """One on its way."""
        return self._pool.submit(complete, self._server, tokens, key, **fields)

    def leave(self, count: int = 1) -> None:
        """The clients of so many streams close their connections."""
        for _ in range(count):
            self.open.pop(0)[0].close()

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave(len(self.open))
        self._pool.shutdown()


def filled(server: Server, crowd: Crowd, most: int = WAITING, key: str = "one") -> list["Future[httpx.Response]"]:
    """`most` requests of a client that wait, which are as many as may: one more is refused."""
    asked: list[Future[httpx.Response]] = []

    def full() -> bool:
        over = [each.result().status_code for each in asked if each.done()]
        assert set(over) <= {429}, "the place was taken by the one that looked"
        asked[:] = [each for each in asked if not each.done()]
        asked.extend(crowd.ask(4, key) for _ in range(most - len(asked)))
        return complete(server, 1, key, headers={"X-Request-Timeout": "0.5"}).status_code == 429

    until(full, LONG_S)
    return asked


def test_a_flood_is_answered_or_refused_in_time(server: Server) -> None:
    with Crowd(server) as crowd:
        crowd.run(SLOTS)
        admitted = filled(server, crowd)
        took = []
        for _ in range(2 * (SLOTS + WAITING)):  # with those that are in, three times what it can
            began = time.monotonic()
            refused = complete(server, 4)
            took.append(time.monotonic() - began)
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("RateLimitError", 429)
        assert sorted(took)[len(took) // 2] < SOON_S
        with pytest.raises(openai.RateLimitError):
            OpenAI(base_url=f"{server.url}/v1", api_key="one", max_retries=0).completions.create(
                model=MODEL, prompt="x"
            )
        asked = {"model": MODEL, "max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
        told = httpx.post(f"{server.url}/v1/messages", json=asked, headers={"Authorization": "Bearer one"}, timeout=60)
        assert (told.status_code, told.json()["error"]["type"]) == (429, "rate_limit_error")
        crowd.leave(SLOTS)
        answers = [each.result() for each in admitted]
        assert [answer.status_code for answer in answers] == [200] * WAITING
        assert {answer.json()["usage"]["completion_tokens"] for answer in answers} == {4}


def test_another_client_has_its_turn(server: Server) -> None:
    with Crowd(server) as crowd:
        crowd.run(SLOTS)
        many = filled(server, crowd)
        few = filled(server, crowd, 2, "another")  # its second has two of the others before it, and one of its own
        over: list[str] = []
        for name, asked in (("many", many), ("few", few)):
            for each in asked:
                each.add_done_callback(lambda _, name=name: over.append(name))  # type: ignore[misc]
        crowd.leave()
        assert {each.result().status_code for each in (*many, *few)} == {200}
        until(lambda: len(over) == WAITING + 2, 10.0)
        assert over[:5].count("few") == 2, over


def test_a_deadline_in_the_queue_and_in_an_answer(server: Server) -> None:
    with Crowd(server) as crowd:
        crowd.run(SLOTS)
        late = complete(server, 4, headers={"X-Request-Timeout": "0.5"})
        assert (late.status_code, late.headers["x-should-retry"]) == (408, "false")
        assert "0.5 s" in late.json()["error"]["message"]
    began = time.monotonic()
    complete(server, 4)
    timeout_s = max(1.0, 3 * (time.monotonic() - began))
    body = {"model": MODEL, "prompt": "Once", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{server.url}/v1/completions", json=body | {"timeout": timeout_s}, timeout=LONG_S
    ) as response:
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert (response.status_code, events[-1]) == (200, "[DONE]")
    assert json.loads(events[-2])["error"]["code"] == 408
    assert len(events) > 3, "what was there before came"
    until(lambda: running(server) == 0, 60.0)
    assert complete(server, 4).status_code == 200


def running(server: Server) -> int:
    """Requests in the engine."""
    (replica,) = httpx.get(f"{server.url}/v1/rack").json()["replicas"]
    return int(replica["running"])


def test_a_batch_yields_and_fails_no_line(server: Server) -> None:
    count = 3 * (SLOTS + WAITING)
    lines = [
        {
            "custom_id": str(number),
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": MODEL, "prompt": f"Number {number} is", "max_tokens": 40, "ignore_eos": True},
        }
        for number in range(count)
    ]
    client = server.client()
    file = client.files.create(file=("in.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
    until(lambda: client.batches.retrieve(batch.id).status == "in_progress", 60.0)
    people = [complete(server, 4) for _ in range(3)]
    assert [answer.status_code for answer in people] == [200] * 3
    done = client.batches.retrieve(batch.id)
    assert done.status == "in_progress", "people did not wait for all of it"
    until(lambda: client.batches.retrieve(batch.id).status == "completed", LONG_S)
    counts = client.batches.retrieve(batch.id).request_counts
    assert counts is not None
    assert (counts.completed, counts.failed) == (count, 0)
