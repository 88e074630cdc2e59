"""Answers that go on when the engine, the worker or the process that gives them is killed: no client notices more than
a pause, and each reads what engines say to which nothing happens."""

import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import psutil
import pytest
from answers_compared import CASES, TOOLS, all_good, answers_of, ask_all, assert_same
from rack_serving import until
from serve_process import Server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

MODEL = "smollm2"
TOKENS = 60
RECOVERY_S = 300.0
WORKER, CORE, ENGINE = "WorkerActor", "EngineCore", "ServeReplica:pomarium:engine"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("failover"), ["--replicas", "2", *TOOLS])
    server.ensure()
    yield server
    server.end()


@pytest.fixture(scope="module")
def quiet(server: Server) -> dict[bool, dict[str, Any]]:
    """The answers of engines that nothing happens to, streamed and not."""
    return {stream: all_good(answers_of(ask_all(server.url, MODEL, TOKENS, stream=stream))) for stream in (True, False)}


def processes(server: Server, name: str) -> list[psutil.Process]:
    """Those of that name, which have not ended. EngineCore's title hides its environment, by which a server's processes
    are found, and is not always set: it is the one child of an engine's process that tracks no resources."""
    if name != CORE:
        return [process for process in server.processes() if name in title(process)]
    found: list[psutil.Process] = []
    for engine in processes(server, ENGINE):
        with suppress(psutil.NoSuchProcess):
            titles = {child: title(child) for child in engine.children()}
            found += [child for child, said in titles.items() if said and "resource_tracker" not in said]
    return found


def title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def busy(server: Server, name: str) -> psutil.Process:
    """The process of that name that computes most."""
    found = {process: sum(process.cpu_times()[:2]) for process in processes(server, name)}
    assert len(found) == 2, found
    time.sleep(0.3)
    return max(found, key=lambda process: sum(process.cpu_times()[:2]) - found[process])


def shown(server: Server) -> str:
    return str({name: processes(server, name) for name in (WORKER, CORE, ENGINE)})


def two_serve(server: Server) -> None:
    lost = server.output.count("an engine was lost")
    until(lambda: server.output.count("ready again") >= lost, RECOVERY_S, lambda: server.output)
    until(lambda: httpx.get(f"{server.url}/health", timeout=20).status_code == 200, RECOVERY_S, server.log)
    for name in (CORE, WORKER):
        until(lambda name=name: len(processes(server, name)) == 2, RECOVERY_S, lambda: shown(server))


@pytest.mark.parametrize(("name", "stream"), [(WORKER, True), (WORKER, False), (CORE, True), (ENGINE, True)])
def test_a_killed_process_ends_no_answer(
    server: Server, quiet: dict[bool, dict[str, Any]], name: str, stream: bool
) -> None:
    two_serve(server)
    asked = ask_all(server.url, MODEL, TOKENS, stream=stream)
    busy(server, name).kill()
    assert_same(answers_of(asked), quiet[stream])
    gaps = {case: round(one.longest_gap_s, 1) for case, one in asked.items()}
    print(f"{name} killed: the longest gaps of streams were {gaps} s")


def test_what_a_client_may_not_say(server: Server) -> None:
    body = {**CASES["greedy"].whole(4, stream=False), "vllm_xargs": {"pomarium_outputs": [1, 2]}}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert "is not for clients" in answer.text
