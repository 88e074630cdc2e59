"""Whether anything listens where RAY_ADDRESS points. Ray itself tries for minutes before it says that nothing does."""

import socket

from pomarium.worker.errors import SettingsError

CONNECT_S = 2.0


def answers(address: str) -> bool:
    """Whether something listens at host:port. "auto" and the like name no port: left to Ray."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return True
    try:
        socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def require(address: str) -> None:
    """Raises SettingsError unless something listens there."""
    if not answers(address):
        raise SettingsError(f"No Ray answers at RAY_ADDRESS={address}: start it or unset the variable.")
