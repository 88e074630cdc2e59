"""Our own addresses: IPv6 ones in URLs, and connections that no proxy of the environment comes between."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from endpoint_stub import Stub, serving
from recording_proxy import Proxy, proxied
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from pomarium.cluster.batch import ray_jobs
from pomarium.cluster.batch.http_engine import EndpointError, HttpEngine
from pomarium.cluster.batch.lines import Request
from pomarium.cluster.endpoint import local_ray, metrics_page
from pomarium.cluster.node import ray_node
from pomarium.cluster.node.direct import PROXIES, direct
from pomarium.cluster.node.membership import Membership
from pomarium.cluster.rack import current
from pomarium.cluster.rack.this_machine import resolve
from pomarium.worker.address import authority, host_of, http_url, is_local
from pomarium.worker.errors import SettingsError

ASKED = Request(1, "r1", "/v1/completions", b"{}")


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with proxied(monkeypatch) as found:
        yield found


def ask(url: str, **options: Any) -> int:
    async def run() -> int:
        engine = HttpEngine(url, None, outage_s=0.0, **options)
        try:
            await engine.start()
            return (await engine.answer(ASKED)).status
        finally:
            await engine.close()

    return asyncio.run(run())


def test_a_proxy_is_asked_for_what_is_not_ours(proxy: Proxy) -> None:
    with serving(Stub()) as url:
        assert ask(url) == 200
    assert proxy.asked == []
    with pytest.raises(EndpointError):
        ask("http://models.example.com")
    assert proxy.asked == [b"GET http://models.example.com/v1/models HTTP/1.1"], "of the Internet, as the user set it"
    with pytest.raises(EndpointError):
        ask("http://models.invalid", own=True)
    assert len(proxy.asked) == 1


@contextmanager
def job_server() -> Iterator[int]:
    async def version(request: HttpRequest) -> Response:
        return JSONResponse({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def listed(request: HttpRequest) -> Response:
        return JSONResponse([])

    app = Starlette(routes=[Route("/api/version", version), Route("/api/jobs/", listed)])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def test_jobs_of_the_rack_are_asked_for_past_a_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    rack = SimpleNamespace(address="127.0.0.1:6379", membership=SimpleNamespace(variables=dict))
    monkeypatch.setattr(current, "enter", lambda: rack)
    with job_server() as port:
        monkeypatch.setattr(ray_node, "JOBS_PORT", port)
        assert ray_jobs.status(None) == ["no batch was submitted to this rack"]
    assert proxy.asked == []


def test_ray_s_own_commands_are_told_of_a_proxy_only_where_there_is_one() -> None:
    rack: Any = SimpleNamespace(address="10.0.0.5:6379", membership=SimpleNamespace(variables=dict))
    assert "no_proxy" not in current.for_ray_commands(rack, {})
    told = current.for_ray_commands(rack, {"HTTPS_PROXY": "http://proxy:3128", "NO_PROXY": "a,b"})
    assert (told["no_proxy"], told["NO_PROXY"]) == ("a,b,127.0.0.1,10.0.0.5", "a,b,127.0.0.1,10.0.0.5")


def test_ray_s_processes_ask_no_proxy_for_their_own_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Else no series of theirs reaches its node's agent, whose gRPC exporter has no option against it."""
    spec, membership = ray_node.NodeSpec("mac", "10.0.0.6", tmp_path), Membership("ab", "10.0.0.5:6379", "f" * 64)
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    for environ in (local_ray.environment("s"), ray_node.environment(spec, membership, {})):
        assert "no_proxy" not in environ, "on macOS it would hide the system's own settings"
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "a")
    for environ in (local_ray.environment("s"), ray_node.environment(spec, membership, os.environ)):
        assert (environ["no_proxy"], environ["NO_PROXY"]) == ("a,127.0.0.1", "a,127.0.0.1")


@pytest.mark.parametrize(
    ("before", "after"),
    [({}, "h"), ({"no_proxy": "a"}, "a,h"), ({"NO_PROXY": "h,a"}, "h,a"), ({"no_proxy": "*"}, "*")],
)
def test_what_was_excepted_from_the_proxy_stays_so(before: dict[str, str], after: str) -> None:
    assert direct(before, "h") == {"no_proxy": after, "NO_PROXY": after}


@pytest.mark.parametrize(
    ("host", "url"),
    [("::1", "http://[::1]:80"), ("fe80::1%en0", "http://[fe80::1%25en0]:80"), ("h.local", "http://h.local:80")],
)
def test_urls_hold_addresses_of_both_kinds(host: str, url: str) -> None:
    assert http_url(host, 80) == url
    assert host_of(authority(host, 80)) == host


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True), ("::1", True), ("10.1.2.3", True), ("192.168.1.9", True), ("fe80::1", True),
        ("fd00::1", True), ("100.64.0.1", True), ("localhost", True), ("studio-1", True), ("studio.local.", True),
        ("8.8.8.8", False), ("2001:4860::8888", False), ("models.example.com", False), ("local.example", False),
    ],
)  # fmt: skip
def test_whose_network_a_host_is_in(host: str, local: bool) -> None:
    assert is_local(host) is local


@pytest.mark.parametrize("url", ["http://::1:8102", "localhost:8000", "ftp://x", "http://", "", "http://h:port"])
def test_what_is_no_url_is_refused_at_once(url: str) -> None:
    with pytest.raises(EndpointError, match="is no URL"):
        HttpEngine(url, None)


def test_exporters_of_nodes_with_either_kind_of_address() -> None:
    nodes = [{"Alive": True, "MetricsExportPort": 9, "NodeManagerAddress": host} for host in ("10.0.0.1", "fd00::1")]
    assert metrics_page.addresses(nodes) == ["http://10.0.0.1:9/metrics", "http://[fd00::1]:9/metrics"]


@pytest.mark.parametrize("head", ["::1", "fd00::1:6379", "[::1]:6379"])
def test_a_rack_of_ipv6_is_refused_by_its_name(head: str) -> None:
    with pytest.raises(SettingsError, match=r"is an IPv6 address.*IPv4"):
        resolve(head)
