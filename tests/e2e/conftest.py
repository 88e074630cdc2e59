"""One `pomarium serve` with the embedded model for all end-to-end tests, started again where a test ended it."""

from collections.abc import Iterator

import pytest
from openai import OpenAI
from serve_process import Server


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("serve"))
    yield server
    if server.process is not None and server.process.poll() is None:
        server.interrupt()
    server.kill()


@pytest.fixture
def server(_server: Server) -> Server:
    """The server, ready."""
    _server.ensure()
    return _server


@pytest.fixture
def client(server: Server) -> OpenAI:
    """OpenAI's official client of the server."""
    return server.client()
