"""Whether one can listen: on sockets that refuse a second listener, and on those of macOS, which do not always."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from pomarium.cluster.cli.serve import check_port
from pomarium.cluster.machine import listening
from pomarium.worker.errors import SettingsError


@pytest.fixture(params=["", "127.0.0.1"])
def taken(request: pytest.FixtureRequest) -> Iterator[int]:
    """A port on which somebody listens, on all addresses or on one."""
    with socket.create_server((request.param, 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def bsd(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS's, sockets bind to an address beside a listener of all, and to all beside a listener of one."""
    monkeypatch.setattr(listening, "_bind", lambda *_: None)


@pytest.mark.parametrize("host", ["", "127.0.0.1", "localhost", "0.0.0.0"])
def test_a_taken_port_is_not_free(host: str, taken: int) -> None:
    assert not listening.is_free(host, taken)


@pytest.mark.usefixtures("bsd")
@pytest.mark.parametrize("host", ["", "127.0.0.1", "0.0.0.0"])
def test_nor_is_it_where_the_system_lets_one_bind(host: str, taken: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
        listening.check(host, taken)


@pytest.mark.usefixtures("bsd")
def test_serve_refuses_a_port_that_macos_would_share(taken: int) -> None:
    with pytest.raises(SettingsError, match=rf"127\.0\.0\.1:{taken} \(Address already in use\): choose"):
        check_port("127.0.0.1", taken)


def unused() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("host", ["", "127.0.0.1", "localhost"])
def test_a_port_of_nobody_is_free(host: str) -> None:
    assert listening.is_free(host, unused())


def test_so_is_one_whose_connection_was_closed_a_moment_ago() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            accepted, _ = server.accept()
            accepted.close()  # first: it is the listener's side that waits
            assert caller.recv(1) == b""
    assert listening.is_free("127.0.0.1", port)


def test_an_address_of_another_machine_is_not() -> None:
    assert not listening.is_free("192.0.2.7", 8000)
    assert not listening.is_free("no-such-host.invalid", 8000)
