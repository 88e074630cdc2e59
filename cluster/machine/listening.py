"""Whether one can listen at an address of this machine, on Linux's sockets and on BSD's, which macOS has.

Linux lets nobody bind beside a listener of all addresses. BSD does, with SO_REUSEADDR (setsockopt(2)), without which a
connection that was closed a minute ago counts as a listener: the newcomer on 127.0.0.1 takes the other's callers away,
and nobody is told. So it is also asked whether somebody answers there.
"""

import errno
import os
import socket
from typing import Any

ANSWER_S = 1.0
"""This machine answers itself, or refuses, at once; a firewall may do neither."""


def check(host: str, port: int) -> None:
    """Raises OSError unless one can listen there; "" is all IPv4 addresses. socket.gaierror: `host` is none."""
    family, kind, protocol, _, address = resolved(host, port)
    with socket.socket(family, kind, protocol) as probe:
        _bind(probe, address)
    if _is_answered(family, kind, protocol, address):
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def is_free(host: str, port: int) -> bool:
    """`check`, without the reason."""
    try:
        check(host, port)
    except OSError:
        return False
    return True


def listener(host: str, port: int, backlog: int = 2048) -> socket.socket:
    """A socket that listens there. Raises as `check`."""
    check(host, port)
    family, kind, protocol, _, address = resolved(host, port)
    bound = socket.socket(family, kind, protocol)
    try:
        _bind(bound, address, backlog)
    except OSError:
        bound.close()
        raise
    return bound


def resolved(host: str, port: int) -> tuple[Any, ...]:
    """Family, kind, protocol, a name, and the address as sockets take it. socket.gaierror: `host` is none."""
    return socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)[0]


def _bind(bound: socket.socket, address: tuple[object, ...], backlog: int = 1) -> None:
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.listen(backlog)


def _is_answered(family: int, kind: int, protocol: int, address: tuple[object, ...]) -> bool:
    with socket.socket(family, kind, protocol) as caller:
        caller.settimeout(ANSWER_S)
        try:
            caller.connect(address)  # 0.0.0.0 and :: reach this machine itself
        except OSError:
            return False
        # A caller to whom the system gave this very port reaches itself.
        return bool(caller.getsockname() != caller.getpeername())
