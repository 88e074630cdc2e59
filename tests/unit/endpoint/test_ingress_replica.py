"""The ingress as Serve starts it: a port of its own, or a sentence on why it has none."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from pomarium.cluster import faults
from pomarium.cluster.endpoint import ingress_replica
from pomarium.cluster.endpoint.answers import Answers
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.ingress_replica import IngressReplica, route_of
from pomarium.cluster.http.protocols import GENERATED
from pomarium.cluster.node import ports
from pomarium.cluster.replica.serve_plan import Batches


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/models", "/v1/models"),
        ("/v1/models/org/name", "/v1/models"),
        ("/v1/files/file-1/content", "/v1/files"),
        ("/v1/filesystem", "other"),
        ("/v1/messages/count_tokens", "/v1/messages/count_tokens"),
        ("/v1/messages/batches", "/v1/messages"),
        ("/v1/responses/resp_1/cancel", "/v1/responses"),
        ("/v1/embeddings", "/v1/embeddings"),
        ("/version", "/version"),
        ("/v1/completions/x", "other"),
        ("/" + "x" * 10_000, "other"),
    ],
)
def test_requests_are_counted_by_few_names(path: str, route: str) -> None:
    assert route_of(path) == route


class Handle:
    """Of an engine, as Serve hands it in."""

    deployment_name = "engine:m"

    def __init__(self) -> None:
        self.met = False

    def options(self) -> "Handle":
        self.met = True
        return self


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """What the metric is told; nothing here takes a Ray."""
    told: list[dict[str, str]] = []

    class Counter:
        def __init__(self, *_: object, **__: object) -> None: ...

        def inc(self, tags: dict[str, str]) -> None:
            told.append(tags)

    async def listen() -> Answers:
        answers = Answers("127.0.0.1")
        await answers.start()
        return answers

    def made(*arguments: Any, **more: Any) -> Ingress:
        return Ingress(*arguments, **more, head_answers=lambda: True, shortage=lambda: None, listen=listen)

    monkeypatch.setattr(ingress_replica, "Counter", Counter)
    monkeypatch.setattr(ingress_replica, "Ingress", made)
    monkeypatch.setattr(ingress_replica, "_serve_waits_s", lambda: 0.0)
    monkeypatch.setattr(ingress_replica, "session_folder", lambda: str(tmp_path))
    return told


async def started(port: int, folder: Path, handle: Handle) -> IngressReplica:
    replica = IngressReplica.__new__(IngressReplica)
    batches = Batches(str(folder / "batches"), f"http://127.0.0.1:{port}")
    await replica.__init__("127.0.0.1", port, (), {"m": handle}, frozenset({"key"}), batches, {}, 7)  # type: ignore[misc]
    return replica


# Serve awaits it once; what is collected later has ended.
@pytest.mark.filterwarnings("ignore:coroutine 'IngressReplica.__del__'")
def test_two_listen_on_one_port_until_they_are_ended(counted: list[dict[str, str]], tmp_path: Path) -> None:
    async def scenario() -> None:
        port, handles = ports.free(1)[0], [Handle(), Handle()]
        first, second = [await started(port, tmp_path, handle) for handle in handles]
        assert all(handle.met for handle in handles), "before the first request"
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(timeout=60) as client:
            for _ in range(10):
                assert (await client.get(f"{url}/v1/files", headers={"Authorization": "Bearer key"})).status_code == 200
            assert (await client.get(f"{url}/v1/models")).status_code == 401
            refused = await client.get(f"{url}/v1/completions", headers={"Authorization": "Bearer key"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (405, "BadRequestError")
            missing = await client.get(f"{url}/nothing")
            assert (missing.status_code, json.loads(missing.text)["error"]["code"]) == (404, 404)
        await first.__del__()  # Serve's way to end it
        with pytest.raises(RuntimeError):
            first.check_health()
        second.check_health()
        async with httpx.AsyncClient(timeout=60) as client:
            assert (await client.get(f"{url}/v1/models")).status_code == 401
        await second.__del__()

    asyncio.run(scenario())
    assert counted[0] == {"method": "GET", "route": "/v1/files", "status": "200"}
    assert {"method": "GET", "route": "other", "status": "404"} in counted
    assert set(GENERATED) >= {one["route"] for one in counted if one["status"] == "405"}


def test_a_port_that_somebody_has_is_a_sentence(
    counted: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress_replica, "FREE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(faults.StartError) as refusal:
            asyncio.run(started(port, tmp_path, Handle()))
    said = faults.marked_sentence(str(refusal.value))
    assert said is not None
    assert said.startswith(f"Cannot listen on 127.0.0.1:{port} (Address already in use): end what listens there")
