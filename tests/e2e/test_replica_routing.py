"""Two engines of one model: prompts find the cache that knows them, and nobody waits for a replica that is frozen."""

import re
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest
from agent_session import ENOUGH, TURNS, replayed, shares, told
from serve_process import Server
from streaming import Stream
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900), pytest.mark.full]

CONTEXT = 4096
STREAM_TOKENS = 1500
USERS, SYSTEMS = 5, 4
FAULT_S = 10.0
"""In what time a fault has to reach every request that it concerns."""
RECOVERY_S = 240.0
REASON = re.compile("no engine answers|engine was lost")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("replicas")
    model = write_checkpoint("llama", folder / "tiny", max_position_embeddings=CONTEXT)
    options = ["--replicas", "2", "--max-model-len", str(CONTEXT), "--enable-prompt-tokens-details", "--failovers", "0"]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    server = Server(folder, [str(model), *options])
    server.ensure()
    yield server
    server.interrupt()
    server.kill()


def chat(server: Server, system: int, user: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": f"{system} is the number. " * 60}, {"role": "user", "content": user}]
    body = {"messages": messages, "max_tokens": 2, "ignore_eos": True}
    answer: dict[str, Any] = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120).json()
    return answer


def test_a_prompt_goes_to_the_replica_that_knows_its_beginning(server: Server) -> None:
    """Each system prompt is computed once, wherever; every user after the first finds it in the cache."""
    shares = []
    for user in range(USERS):
        for system in range(SYSTEMS):
            usage = chat(server, system, f"user {user}")["usage"]
            shares.append(((usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0) / usage["prompt_tokens"])
    assert all(share < 0.2 for share in shares[:SYSTEMS])
    assert all(share > 0.8 for share in shares[SYSTEMS:]), shares


def test_an_agent_s_turns_find_the_engine_that_knows_them(server: Server) -> None:
    for path, turns in replayed(server.url, "none", "tiny").items():
        print(told(path, turns))
        assert min(shares(turns)) >= ENOUGH, told(path, turns)
    while (counted := differing(server)) < 2 * TURNS:  # a scrape is seconds old
        time.sleep(0.5)
    assert counted >= 2 * TURNS


def differing(server: Server) -> float:
    """Prompts of which the workers have told where they differ from those before them."""
    page = httpx.get(f"{server.url}/metrics", timeout=30).text
    name = "ray_pomarium_prompt_differs_at_tokens_count{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(name))


def replicas(server: Server) -> list[psutil.Process]:
    return [p for p in server.processes() if "ServeReplica:pomarium:engine" in " ".join(p.cmdline())]


def test_a_frozen_replica_ends_its_requests_and_the_other_goes_on(server: Server) -> None:
    """SIGSTOP: no connection is reset and no error sent, as when a machine loses its power."""
    streams = [Stream(server.url, f"{i} " * 50, STREAM_TOKENS) for i in range(4)]
    for stream in streams:
        stream.start()
    for stream in streams:
        assert stream.begun.wait(60)
    victim = replicas(server)[0]
    frozen = [victim, *victim.children(recursive=True)]
    for process in frozen:
        process.send_signal(signal.SIGSTOP)
    fault = time.monotonic()
    try:
        for turn in range(3):  # the first of these may be sent to the frozen replica, none after that
            began = time.monotonic()
            answer = chat(server, 100 + turn, "Are you there?")
            assert time.monotonic() - began < FAULT_S
            assert "choices" in answer or turn == 0, answer
        for stream in streams:
            stream.join(120)
        lost = [s for s in streams if "error" in s.last]
        assert lost
        assert len(lost) < len(streams)
        assert all(s.last["error"]["code"] == 503 and s.ended - fault < FAULT_S for s in lost)
    finally:
        for process in frozen:
            if process.is_running():
                process.send_signal(signal.SIGCONT)


def test_without_any_replica_requests_and_health_say_why_at_once(server: Server) -> None:
    for replica in replicas(server):
        replica.kill()
    deadline = time.monotonic() + FAULT_S
    while True:
        began = time.monotonic()
        health = httpx.get(f"{server.url}/health", timeout=10)
        assert time.monotonic() - began < 3
        if health.status_code == 503:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert REASON.search(health.json()["models"]["tiny"])
    began = time.monotonic()
    answer = chat(server, 0, "Anybody?")
    assert time.monotonic() - began < 3
    assert answer["error"]["code"] == 503
    assert REASON.search(answer["error"]["message"])
    deadline = time.monotonic() + RECOVERY_S
    while httpx.get(f"{server.url}/health", timeout=10).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(1)
    assert "choices" in chat(server, 0, "Anybody?")
