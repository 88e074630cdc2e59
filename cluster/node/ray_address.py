"""What is there where RAY_ADDRESS points. Ray itself tries for minutes before it says that nothing is, or no Ray.

host:port --connect, HTTP/2's preface--> Answer: nobody, somebody else, a gRPC server as Ray's head is one
"""

import os
import socket
import time
from collections.abc import Mapping
from enum import Enum

from pomarium.worker import local_network
from pomarium.worker.errors import SettingsError

CONNECT_S = 2.0
GREETING_S = 5.0
"""How long a server may take to its first bytes: gRPC's sends them before Ray's own code has anything to do."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
"""What a client of HTTP/2 says first, with empty settings (RFC 9113, 3.4)."""
_FRAME_HEADER = 9
_SETTINGS = 4
"""Length of a frame's header; its fourth byte is the type, and a server has to begin with this one."""


class Answer(Enum):
    """Who listens."""

    NOBODY = "nobody"
    OTHER = "somebody who does not speak gRPC"
    GRPC = "a gRPC server, or what only Ray can tell"


def answers(address: str) -> bool:
    """Whether something listens at host:port. "auto" and the like name no port: left to Ray."""
    return fault(address) is None


def fault(address: str) -> OSError | None:
    """What the system says of a connection to host:port, its errno with it; None if something listens there."""
    endpoint = _endpoint(address)
    return None if endpoint is None else local_network.fault(*endpoint, CONNECT_S)


def no_rack(address: str, error: OSError) -> SettingsError:
    """Nobody listens where a rack's head should; to be raised from `error`."""
    cure = local_network.advice(error, address) or (
        "look whether `pomarium rack up` runs there under that address, and whether a firewall lets this port pass"
    )
    return SettingsError(f"No rack answers at {address} ({local_network.reason(error)}): {cure}.")


def look(address: str, environ: Mapping[str, str] = os.environ) -> Answer:
    """Who listens at host:port. "auto" and the like are left to Ray, and so is what speaks TLS (RAY_USE_TLS)."""
    endpoint = _endpoint(address)
    if endpoint is None:
        return Answer.GRPC
    try:
        with socket.create_connection(endpoint, timeout=CONNECT_S) as connection:
            if environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return Answer.GRPC
            return Answer.GRPC if _greets(connection) else Answer.OTHER
    except OSError:
        return Answer.NOBODY


def require(address: str) -> None:
    """Raises SettingsError unless Ray may be there."""
    answer = look(address)
    if answer is Answer.NOBODY:
        error = fault(address)
        cure = "" if error is None else local_network.advice(error, address)
        told = f" ({cure})" if cure else ""
        raise SettingsError(
            f"No Ray answers at RAY_ADDRESS={address}: start it or unset the variable{told}."
        ) from error
    if answer is Answer.OTHER:
        raise SettingsError(
            f"What answers at RAY_ADDRESS={address} is no Ray: give the address of Ray's head (port 6379 by default), "
            "or unset the variable."
        )


def _endpoint(address: str) -> tuple[str, int] | None:
    host, _, port = address.rpartition(":")
    if not port.isascii() or not port.isdigit():
        return None
    return host.removeprefix("ray://").removeprefix("[").removesuffix("]"), int(port)


def _greets(connection: socket.socket) -> bool:
    """Whether the other end begins as a server of HTTP/2 does."""
    deadline, begun = time.monotonic() + GREETING_S, b""
    try:
        connection.sendall(_PREFACE)
        while len(begun) < _FRAME_HEADER and (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not (piece := connection.recv(_FRAME_HEADER - len(begun))):
                break
            begun += piece
    except OSError:
        return False
    return len(begun) == _FRAME_HEADER and begun[3] == _SETTINGS
