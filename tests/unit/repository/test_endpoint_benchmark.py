"""benchmarks/endpoint.py: its arithmetic, how it tells processes apart, and that it runs."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import leftovers
import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark is a script: its modules import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.mark.parametrize(
    ("title", "side", "kind"),
    [
        ("ray::ServeReplica:pomarium:ingress", "pomarium", "ingress"),
        ("ray::ServeReplica:pomarium:engine:model", "pomarium", "engine replica"),
        ("ray::ServeReplica:llm:LLMServer:model", "ray-llm", "engine replica"),
        ("ray::ServeReplica:llm:OpenAiIngress", "ray-llm", "ingress"),
        ("ray::ProxyActor", "pomarium", "Serve proxy"),
        ("/bin/haproxy -db -f haproxy.cfg", "ray-llm-direct", "Serve proxy"),
        ("VLLM::EngineCore", "vllm", "EngineCore, workers"),
        ("ray::WorkerActor", "pomarium", "EngineCore, workers"),
        ("python vllm serve folder --port=1", "vllm", "vLLM's API server"),
        ("python -m pomarium.cluster.cli.main serve folder", "pomarium", "Ray"),
        ("ray::ServeController", "pomarium", "Ray"),
    ],
)
def test_processes_are_told_apart_by_their_titles(title: str, side: str, kind: str) -> None:
    from endpoint_sides import kind_of

    assert kind_of(title, side) == kind


class Chunks:
    """A server that sends these reads, and then closes if it is told to."""

    def __init__(self, *pieces: bytes, closes: bool = False) -> None:
        self._pieces, self._closes = pieces, closes

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Each request the same."""
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            await reader.readexactly(length)
            for piece in self._pieces:
                writer.write(piece)
                await asyncio.sleep(0.02)
            if self._closes:
                writer.close()
                return


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = b'x\r\ndata: {"usage":{"prompt_tokens":9,"completion_tokens":4}}\n\n\r\nx\r\ndata: [DONE]\n\n\r\n'
WHOLE = (HEAD, b"x\r\ndata: {}\n\n\r\n", b"x\r\n: a beat\n\n\r\n", b"x\r\ndata: {}\n\n\r\n", USAGE + b"0\r", b"\n\r\n")


def ask(server: Chunks, **asked: int) -> Mapping[str, float]:
    """What the client tells of a run against it."""
    import dataclasses

    from endpoint_client import Run, carry_out

    async def run() -> Mapping[str, float]:
        started = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        async with started:
            port = started.sockets[0].getsockname()[1]
            given = {"streams": 1, "requests": 1, "tokens": 4} | asked
            return dataclasses.asdict(await carry_out(Run(port, "model", timeout_s=20, **given), 0))

    return asyncio.run(run())


def test_tokens_are_counted_by_the_usage_and_arrivals_by_events() -> None:
    told = ask(Chunks(*WHOLE), streams=2, requests=3)
    assert told["tokens"] == 2 * 3 * 4
    assert told["arrivals"] == 2 * 3 * 3, "neither a beat nor a head is an event"
    assert told["first_p50"] > 0.01, "the head is not the first event"
    assert told["token"] >= 0.015, "three pauses or more, by the three tokens after the first"


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        (Chunks(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"), "not answered: b'HTTP/1.1 503"),
        (Chunks(*WHOLE[:3], closes=True), "connection was lost"),
        (Chunks(*WHOLE[:-2], USAGE.replace(b":4", b":3") + b"0\r\n\r\n"), "3 tokens came of 4"),
    ],
)
def test_an_answer_that_is_not_whole_fails_the_run(server: Chunks, reason: str) -> None:
    with pytest.raises(RuntimeError, match=reason):
        ask(server, streams=2)


def test_a_level_holds_while_streams_keep_up() -> None:
    import endpoint
    from endpoint_client import Outcome

    def level(token: float, between: float) -> endpoint.Level:
        outcome = Outcome(1000, 2.0, 0.1, 0.2, token, token, token, between, 1000, 0.1)
        measured = endpoint.Measured(outcome, {"ingress": 100.0, "Serve proxy": 20.0, "Ray": 7.0}, 0.0)
        return endpoint.Level("pomarium", 1, 1, 10, measured)

    assert (level(0.02, 0.039).held, level(0.02, 0.041).held, level(0.023, 0.023).held) == (True, False, False)
    assert level(0.03, 0.03).late_s == pytest.approx(0.99), "10 ms for each of the 99 tokens after the first"
    assert (level(0.02, 0.02).carried, level(0.02, 0.02).measured.endpoint) == (500.0, 120.0)
    rows = endpoint.ends([level(0.02, 0.02), level(0.05, 0.05)]).splitlines()
    assert rows[-1] == "| pomarium | 1 | 1 | 500 | 500 | yes |"


@pytest.mark.e2e
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["--sides", "pomarium", "vllm"], id="sides"),
        pytest.param(["--stub", "--sides", "pomarium"], id="stub", marks=pytest.mark.full),
    ],
)
def test_it_runs_and_leaves_nothing(words: list[str]) -> None:
    before = {process.pid for process in leftovers.marked(lambda mark: mark == os.environ[leftovers.RUN])}
    command = [sys.executable, str(BENCHMARKS / "endpoint.py"), "--quick", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    assert "not measured" not in done.stdout, done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith(("| pomarium |", "| vllm |"))]
    assert len(rows) == (2 * 2 if "--stub" in words else 2 * 2 * 2 + 2)
    left = leftovers.marked(lambda mark: mark == os.environ[leftovers.RUN])
    assert {process.pid for process in left} <= before, left
