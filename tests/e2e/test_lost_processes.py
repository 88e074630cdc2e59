"""What becomes of an endpoint of two engines whose processes are killed, one kind after the other, while it answers.
Answers end with their engine here; test_failover.py has those that go on."""

import re
from collections.abc import Iterator

import httpx
import psutil
import pytest
from rack_serving import until
from serve_process import STOP_S, Server
from streaming import Stream
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CONTEXT = 4096
TOKENS, MOST_TOKENS = 1200, 3900
MOST_STREAMS = 24
RECOVERY_S = 300.0
END_S = 120.0
ENGINE, INGRESS = "ServeReplica:pomarium:engine", "ServeReplica:pomarium:ingress"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("lost")
    model = write_checkpoint("llama", folder / "tiny", max_position_embeddings=CONTEXT)
    options = ["--replicas", "2", "--ingresses", "2", "--max-model-len", str(CONTEXT), "--failovers", "0"]
    server = Server(folder, [str(model), *options])
    server.ensure()
    yield server
    server.end()


def processes(server: Server, name: str) -> list[psutil.Process]:
    return [process for process in server.processes() if name in " ".join(process.cmdline())]


def health(server: Server) -> httpx.Response:
    return httpx.get(f"{server.url}/health", timeout=20)


def complete(server: Server, tokens: int = 2) -> httpx.Response:
    body = {"prompt": "abc", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)


def serves(server: Server) -> bool:
    try:
        return health(server).status_code == 200 and complete(server).status_code == 200
    except httpx.HTTPError:
        return False


def streams(server: Server, count: int = 4, tokens: int = TOKENS) -> list[Stream]:
    begun = [Stream(server.url, f"{index} " * 20, tokens) for index in range(count)]
    for stream in begun:
        stream.start()
    for stream in begun:
        assert stream.begun.wait(120), (stream.last, stream.fault)
    return begun


def test_a_killed_controller_takes_nothing_with_it(server: Server) -> None:
    engines = {process.pid for process in processes(server, ENGINE)}
    assert len(engines) == 2
    running = streams(server)
    (controller,) = processes(server, "ServeController")
    controller.kill()
    for stream in running:
        stream.join(300)
    assert all(stream.whole for stream in running), [(stream.last, stream.fault) for stream in running]
    until(lambda: processes(server, "ServeController"), 60, server.log)
    until(lambda: "controller was lost" in server.output and "ready again" in server.output, 120, server.log)
    assert {process.pid for process in processes(server, ENGINE)} == engines
    assert serves(server)


def test_a_killed_worker_ends_its_requests_with_a_reason_and_is_replaced(server: Server) -> None:
    """No answer is a 500, neither of what ran nor of what comes while the engine dies; also by the new controller."""
    workers = {process: sum(process.cpu_times()[:2]) for process in processes(server, "WorkerActor")}
    # So many that both engines have some, and so long that none has ended before the last one began.
    running = streams(server, 6, MOST_TOKENS)
    worker = max(workers, key=lambda process: sum(process.cpu_times()[:2]) - workers[process])
    worker.kill()
    answers = [complete(server) for _ in range(10)]
    for stream in running:
        stream.join(300)
    refused = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in refused} <= {503}, [answer.text for answer in refused]
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)
    lost = [stream for stream in running if not stream.whole]
    assert 0 < len(lost) < len(running), [(stream.last, stream.fault) for stream in running]
    reason = re.compile(rf"its worker \(pid {worker.pid}\) crashed or was killed, as by signal 9")
    for stream in lost:
        assert stream.last["error"]["code"] == 503, stream.last
        assert reason.search(stream.last["error"]["message"]), stream.last
    until(lambda: re.search(rf"an engine was lost \(tiny: {reason.pattern}", server.output), 30, lambda: server.output)
    until(lambda: len(processes(server, "WorkerActor")) == 2, RECOVERY_S, server.log)
    until(lambda: server.output.rstrip().endswith("ready again"), RECOVERY_S, server.log)
    assert serves(server)


def held(server: Server, ingress: psutil.Process) -> int:
    """Connections of clients that it has."""
    found = ingress.net_connections("tcp4")
    return sum(1 for one in found if one.laddr.port == server.port and one.status == psutil.CONN_ESTABLISHED)


def test_a_killed_ingress_ends_its_own_streams_alone_and_the_port_answers_all_the_while(server: Server) -> None:
    engines = {process.pid for process in processes(server, ENGINE)}
    ingresses = processes(server, INGRESS)
    assert len(ingresses) == 2
    running: list[Stream] = []
    while not running or not all(held(server, ingress) for ingress in ingresses):
        assert len(running) < MOST_STREAMS, "one ingress takes all connections"
        running += streams(server, 2, MOST_TOKENS)
    victim = min(ingresses, key=lambda ingress: held(server, ingress))
    count = held(server, victim)
    victim.kill()
    assert all(complete(server).status_code == 200 for _ in range(5))
    for stream in running:
        stream.join(300)
    assert sum(not stream.whole for stream in running) == count
    until(lambda: len(processes(server, INGRESS)) == 2, 120, server.log)
    until(lambda: server.output.rstrip().endswith("ready again"), 120, lambda: server.output)
    assert "one of the ingresses was lost" in server.output
    assert {process.pid for process in processes(server, ENGINE)} == engines
    assert not processes(server, "ProxyActor"), "nothing of Serve's stands before them"


def test_when_all_ingresses_are_killed_they_come_back(server: Server) -> None:
    told = server.output.count("ready again")
    for process in processes(server, INGRESS):
        process.kill()
    until(lambda: len(processes(server, INGRESS)) == 2 and serves(server), 120, server.log)
    until(lambda: server.output.count("ready again") > told, 120, lambda: server.output)


def test_without_rays_head_what_runs_is_served_and_then_it_ends_in_order(server: Server) -> None:
    (gcs,) = processes(server, "gcs_server")
    gcs.kill()
    answer = until(lambda: (now := health(server)).status_code == 503 and now, 30, server.log)
    assert "Ray's head process (GCS) has ended" in answer.json()["reason"]
    assert complete(server).status_code == 200
    until(lambda: "Ray's head process (GCS) has ended: engines go on" in server.output, 30, lambda: server.output)
    assert server.process is not None
    assert server.process.wait(END_S) == 1
    assert "and so the endpoint was stopped. Start it again" in server.output
    until(lambda: not server.processes(), STOP_S)
