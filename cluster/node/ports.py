"""Addresses and ports of this machine that nodes may listen on."""

import ipaddress
import random
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple

from pomarium.cluster.machine import listening
from pomarium.cluster.node.ray_node import Ports
from pomarium.worker.errors import SettingsError

LOWEST, HIGHEST = 20000, 32000
"""Below what systems hand out by themselves (Linux from 32768, macOS from 49152), above Ray's usual ports."""
PER_NODE = len(astuple(Ports())) - 2
"""All but the span of worker ports, which Ray chooses on a machine of several nodes."""


def free(count: int) -> tuple[int, ...]:
    """Ports that nothing listens on, on any address. Raises SettingsError if there are too few."""
    candidates = random.sample(range(LOWEST, HIGHEST), HIGHEST - LOWEST)
    found = []
    for port in candidates:
        if listening.is_free("", port):
            found.append(port)
        if len(found) == count:
            return tuple(found)
    raise SettingsError(f"This machine has no {count} free ports from {LOWEST} to {HIGHEST}: end some programs.")


def deal(ports: Sequence[int]) -> tuple[Ports, ...]:
    """PER_NODE of the ports for each node; Ray chooses those of workers."""
    dealt = [ports[at : at + PER_NODE] for at in range(0, len(ports), PER_NODE)]
    return tuple(Ports(*(*one, 0, 0)) for one in dealt)


def require(wanted: Ports) -> None:
    """Raises SettingsError unless a node can listen on all ports that are its own alone."""
    for name, port in asdict(wanted).items():
        if "worker" not in name and not listening.is_free("", port):
            raise SettingsError(
                f"Port {port} ({name.replace('_', ' ')} of the rack's node) is in use: end what listens there."
            )


def check_local(address: str) -> None:
    """Raises SettingsError unless `address` is one of this machine's."""
    if (error := _fault(address)) is not None:
        loopback = ipaddress.ip_address(address).is_loopback
        cure = f"run `{alias(address)}`" if loopback else "give one that it has"
        raise SettingsError(f"{address} is not an address of this machine ({error.strerror}): {cure}.") from error


def check_loopback(addresses: Sequence[str]) -> None:
    """Raises SettingsError, with the commands that add them, unless all are addresses of this machine's loopback.

    macOS has 127.0.0.1 alone, and so has Linux where somebody took 127.0.0.0/8 away.
    """
    if absent := [address for address in addresses if _fault(address) is not None]:
        raise SettingsError(
            f"A simulated rack needs loopback addresses that this machine does not have yet: run "
            f"`{' && '.join(map(alias, absent))}`, then this command again (they are gone when it restarts)."
        )


def alias(address: str, platform: str | None = None) -> str:
    """The command that adds a loopback address."""
    if (platform or sys.platform) == "darwin":
        return f"sudo ifconfig lo0 alias {address}"
    return f"sudo ip address add {address}/32 dev lo"


def _fault(address: str) -> OSError | None:
    """Why nobody can listen at the address; None if one can."""
    try:
        with socket.socket() as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error
    return None
