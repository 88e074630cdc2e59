"""Servers that modules share, started again where a test ended them."""

from collections.abc import Iterator

import pytest
from guarded import Guarded
from openai import OpenAI
from serve_process import Server
from sharing import share


@pytest.fixture(scope="session")
def _embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve"))
    yield server
    server.end()


@pytest.fixture
def embedded_server(_embedded: Server, request: pytest.FixtureRequest) -> Server:
    """`pomarium serve` with the embedded model, ready."""
    _embedded.ensure()
    share(request, _embedded.end)
    return _embedded


@pytest.fixture
def server(embedded_server: Server) -> Server:
    """What most modules mean by it."""
    return embedded_server


@pytest.fixture
def client(server: Server) -> OpenAI:
    """OpenAI's official client of the server."""
    return server.client()


@pytest.fixture(scope="session")
def _guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    with Guarded.made(tmp_path_factory.mktemp("guarded")) as guarded:
        yield guarded


@pytest.fixture
def guarded_server(_guarded: Guarded, request: pytest.FixtureRequest) -> Guarded:
    """One with a key, bounds that are soon reached, and proxies in its environment (guarded.py), ready."""
    _guarded.ensure()
    share(request, _guarded.end)
    return _guarded
