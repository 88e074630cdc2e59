"""`pomarium serve` as its users meet it: a real process, the embedded model, OpenAI's official client."""

import json
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serve_process import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "smollm2"
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "big": {"type": "boolean"}},
    "required": ["city", "big"],
    "additionalProperties": False,
}
RECOVERY_S = 300.0


def test_the_terminal_shows_phases_url_and_a_request(server: Server) -> None:
    words = [line.split()[0] for line in server.output.splitlines() if line]
    assert words[:6] == ["log", "ray", "serve", "model", "engine", "ready"]
    assert f"{server.url}/v1" in server.output
    assert f"curl {server.url}/v1/chat/completions" in server.output


def test_paris(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0


def test_paris_streamed(client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
    assert "".join(deltas) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completion_with_logprobs(client: OpenAI) -> None:
    choice = client.completions.create(
        model=MODEL, prompt="The capital of France is", max_tokens=3, temperature=0, logprobs=2
    ).choices[0]
    assert choice.text.startswith(" Paris")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert len(choice.logprobs.token_logprobs) == 3
    assert all(p is not None and p <= 0 for p in choice.logprobs.token_logprobs)


def test_chat_with_top_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=2, temperature=0, logprobs=True, top_logprobs=3
    )
    assert answer.choices[0].logprobs is not None
    first = (answer.choices[0].logprobs.content or [])[0]
    assert len(first.top_logprobs) == 3
    assert first.logprob == max(p.logprob for p in first.top_logprobs)


def test_json_schema_is_kept(client: OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=80, temperature=0, response_format=schema
    )
    value = json.loads(answer.choices[0].message.content or "")
    assert set(value) == {"city", "big"}
    assert isinstance(value["big"], bool)


@pytest.mark.parametrize(
    ("constraint", "pattern"),
    [
        ({"choice": ["Berlin", "Madrid"]}, "Berlin|Madrid"),
        ({"regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"grammar": 'root ::= "yes" | "no"'}, "yes|no"),
    ],
)
def test_structured_outputs_are_kept(client: OpenAI, constraint: dict[str, Any], pattern: str) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=8, extra_body={"structured_outputs": constraint}
    )
    assert re.fullmatch(pattern, answer.choices[0].message.content or "")


def test_models_are_listed(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "pomarium"


def test_health(server: Server) -> None:
    answer = httpx.get(f"{server.url}/health", timeout=10)
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    assert answer.json()["models"][MODEL].startswith("ok"), "more is said of a busy machine"


def test_browsers_of_other_origins_are_kept_out(server: Server) -> None:
    headers = {"Origin": "http://example.com", "Access-Control-Request-Method": "POST"}
    answers = [
        httpx.get(f"{server.url}/v1/models", headers=headers, timeout=10),
        httpx.options(f"{server.url}/v1/chat/completions", headers=headers, timeout=10),
    ]
    assert not [name for a in answers for name in a.headers if name.startswith("access-control")]


def test_metrics_show_ray_and_vllm_and_our_steps(server: Server, client: OpenAI) -> None:
    """Series come with a delay, and Ray drops a gauge of an idle engine: they are looked for while it works."""
    wanted = {"ray_vllm_generation_tokens_total", "ray_vllm_kv_cache_usage_perc", "ray_serve_deployment", "ray_node"}
    wanted |= {f"ray_pomarium_step_{name}" for name in ("seconds_bucket", "budget_tokens", "running_seconds")}
    missing, deadline = wanted, time.monotonic() + 60
    while missing and time.monotonic() < deadline:
        client.completions.create(model=MODEL, prompt="One", max_tokens=20)
        page = httpx.get(f"{server.url}/metrics", timeout=30).text
        missing = {series for series in wanted if f"\n{series}" not in page}
    assert not missing


def test_one_request_after_the_other_takes_no_call_of_serve_s(server: Server, client: OpenAI) -> None:
    """They go over the line that the first of them left open. Both counts are of the replica's process, which tells
    them together."""
    asked = 20

    def counts() -> tuple[float, float]:
        page = httpx.get(f"{server.url}/metrics", timeout=30).text
        return total(page, "ray_vllm_request_success_total"), total(page, "ray_serve_deployment_request_counter_total")

    client.completions.create(model=MODEL, prompt="One", max_tokens=1)
    answered, called = settled(counts)
    for _ in range(asked):
        client.completions.create(model=MODEL, prompt="One", max_tokens=1)
    deadline = time.monotonic() + 60
    while (now := counts())[0] < answered + asked and time.monotonic() < deadline:
        time.sleep(0.5)
    assert now[0] == answered + asked
    assert called > 0, "the first one was"
    assert now[1] - called <= 2


def total(page: str, series: str) -> float:
    """Sum of a counter's series in Prometheus's text, of engines alone where it names deployments."""
    lines = [line for line in page.splitlines() if line.startswith(f"{series}{{") and "ingress" not in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def settled(counts: Callable[[], tuple[float, float]]) -> tuple[float, float]:
    """Once they stay the same for longer than a process keeps them to itself."""
    seen, since = counts(), time.monotonic()
    while time.monotonic() - since < 12:
        time.sleep(1)
        if (now := counts()) != seen:
            seen, since = now, time.monotonic()
    return seen


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: Server, stream: bool) -> None:
    """The engine stops computing: the count of generated tokens comes to rest far from what was asked for."""
    body = {
        "model": MODEL, "prompt": "Once", "n": ANSWERS, "max_tokens": CONTEXT_REST, "ignore_eos": True, "stream": stream
    }  # fmt: skip
    before = server.generated()
    if stream:
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=1.5)
    counts = [server.generated()]
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (len(counts) > 8 and counts[-1] == counts[-8]):
        time.sleep(1)
        counts.append(server.generated())
    assert counts[-1] == counts[-8]
    assert counts[-1] - before < ANSWERS * CONTEXT_REST


CONTEXT_REST, ANSWERS = 900, 16
"""Far more than any machine generates in the 1.5 s that a client waits."""


def test_streams_run_side_by_side(server: Server) -> None:
    answers: list[str] = []

    def ask() -> None:
        answer = server.client().chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
        answers.append(answer.choices[0].message.content or "")

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert all("Paris" in answer for answer in answers)


@pytest.mark.full  # always: one of two by test_lost_processes.py, the only one by tests/rack/test_rack_serving.py
def test_a_killed_worker_is_replaced(server: Server, client: OpenAI) -> None:
    """kill -9: health turns to 503 with a reason within seconds, and to 200 once Serve has started another engine."""
    (worker,) = [p for p in server.processes() if "WorkerActor" in "".join(p.cmdline())]
    worker.kill()
    deadline = time.monotonic() + 30
    while (answer := httpx.get(f"{server.url}/health", timeout=10)).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert answer.status_code == 503
    assert answer.json()["models"][MODEL] != "ok"
    deadline = time.monotonic() + RECOVERY_S
    while httpx.get(f"{server.url}/health", timeout=10).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(1)
    test_paris(client)
    assert "an engine was lost" in server.output


ENDLESS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Once", "ignore_eos": True, "max_tokens": 900},
    "/v1/responses": {"input": "Hi", "ignore_eos": True, "max_output_tokens": 900},
    "/v1/messages": {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 900,
        "output_config": {
            "format": {"type": "json_schema", "schema": {"type": "array", "minItems": 9_000, "items": {}}}
        },
    },
}
"""Streams that go on for as long as anybody waits."""


def test_ctrl_c_tells_streams_and_leaves_nothing(server: Server) -> None:
    begun = {path: threading.Event() for path in ENDLESS}
    heard: dict[str, str] = {}

    def follow(path: str) -> None:
        body = {"model": MODEL, "stream": True} | ENDLESS[path]
        with httpx.stream("POST", server.url + path, json=body, timeout=120) as answer:
            for piece in answer.iter_text():
                heard[path] = heard.get(path, "") + piece
                if "delta" in heard[path] or "text" in heard[path]:
                    begun[path].set()

    followers = [threading.Thread(target=follow, args=[path]) for path in ENDLESS]
    for follower in followers:
        follower.start()
    assert all(event.wait(60) for event in begun.values()), heard
    assert len(server.processes()) > 5
    assert server.interrupt() == 0
    for follower in followers:
        follower.join(30)
    for path, text in heard.items():
        assert text.count("is being stopped") == (2 if path == "/v1/responses" else 1), text[-600:]
        assert text.endswith("data: [DONE]\n\n") is (path == "/v1/completions"), text[-600:]
        assert ("event: error\n" in text) is (path != "/v1/completions")
    assert server.output.endswith("stopping ...\nstopped\n")
    deadline = time.monotonic() + 5
    while server.processes() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [p.cmdline() for p in server.processes()] == []
