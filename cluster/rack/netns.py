"""Simulated Macs as Linux network namespaces: one veth pair each, joined by a bridge, with a link that can be slowed.

    Addresses, Link --commands (pure)--> `ip` and `tc` --build--> network --remove--> nothing

Needs root and iproute2. The rate is held by `tc tbf`; delay and loss by `tc netem`, which not every kernel has.
"""

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.worker.errors import SettingsError

SUBNET = "10.213"
"""Of private addresses (RFC 1918); the third number is the rack's."""
FIRST_HOST = 11
MIN_BURST = 64 << 10


class NetworkError(SettingsError):
    """The kernel or the tools do not give the network that was asked for."""


@dataclass(frozen=True)
class Link:
    """Of each Mac to the bridge. delay_s: one way between two Macs. rate: bytes/s. loss: share of packets, 0 to 1."""

    delay_s: float = 0.0
    rate: float | None = None
    loss: float = 0.0


@dataclass(frozen=True)
class Addresses:
    """Names and addresses of one rack's network. `head`: of the bridge itself, in the root namespace."""

    bridge: str
    head: str
    macs: tuple[str, ...]
    namespaces: tuple[str, ...]


def addresses(count: int, number: int, tag: str) -> Addresses:
    """For `count` Macs of the rack `number`, 0 to 255; `tag` keeps the names of two racks apart."""
    return Addresses(
        f"pm{tag}",
        f"{SUBNET}.{number}.1",
        tuple(f"{SUBNET}.{number}.{FIRST_HOST + index}" for index in range(count)),
        tuple(f"pm{tag}-{index + 1}" for index in range(count)),
    )


def commands(network: Addresses, link: Link) -> list[list[str]]:
    """What sets the network up, in order."""
    found = [
        ["ip", "link", "add", network.bridge, "type", "bridge"],
        ["ip", "address", "add", f"{network.head}/24", "dev", network.bridge],
        ["ip", "link", "set", network.bridge, "up"],
    ]
    for name, address in zip(network.namespaces, network.macs, strict=True):
        inside = ["ip", "-netns", name]
        found += [
            ["ip", "netns", "add", name],
            ["ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name],
            ["ip", "link", "set", name, "master", network.bridge, "up"],
            [*inside, "address", "add", f"{address}/24", "dev", "eth0"],
            [*inside, "link", "set", "eth0", "up"],
            [*inside, "link", "set", "lo", "up"],
            *([["tc", "-netns", name, *shape] for shape in shaping(link)]),
        ]
    return found


def shaping(link: Link) -> list[list[str]]:
    """Arguments of `tc` for one end: what a Mac sends is delayed, lost and held to the rate."""
    found = []
    if link.delay_s or link.loss:
        netem = ["netem", "limit", "10000", "delay", f"{link.delay_s * 1e6:.0f}us", "loss", f"{link.loss * 100:.6f}%"]
        found.append(["qdisc", "add", "dev", "eth0", "root", "handle", "1:", *netem])
    if link.rate is not None:
        parent = ["parent", "1:"] if found else ["root"]
        burst = max(MIN_BURST, int(link.rate / 100))
        tbf = ["tbf", "rate", f"{link.rate * 8:.0f}bit", "burst", str(burst), "latency", "100ms"]
        found.append(["qdisc", "add", "dev", "eth0", *parent, *tbf])
    return found


def require() -> None:
    """Raises SettingsError where namespaces cannot be made."""
    if not sys.platform.startswith("linux"):
        raise SettingsError("--namespaces needs Linux: leave it out, and the Macs have loopback addresses.")
    if os.geteuid() != 0:
        raise SettingsError(
            "--namespaces needs root, to make network namespaces: run it with sudo, or leave it out, and the Macs have "
            "loopback addresses."
        )
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise SettingsError(f"--namespaces needs `{tool}`: install iproute2.")


def build(count: int, link: Link) -> Addresses:
    """Set a network up. Raises NetworkError, leaving nothing."""
    require()
    network = addresses(count, secrets.randbelow(256), secrets.token_hex(2))
    try:
        for command in commands(network, link):
            _run(command)
    except NetworkError:
        remove(network.bridge, network.namespaces)
        raise
    return network


def remove(bridge: str, namespaces: Sequence[str]) -> None:
    """Take down what is there of it. The processes inside must have ended."""
    for command in (*(["ip", "netns", "delete", name] for name in namespaces), ["ip", "link", "delete", bridge]):
        subprocess.run(command, capture_output=True, check=False)  # what is gone already is gone


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    said = " ".join(done.stderr.split()) or f"code {done.returncode}"
    if "netem" in command:
        raise NetworkError(
            f"This kernel cannot delay or lose packets (`tc netem`: {said}): leave --link-delay and --link-loss out, "
            "or load the module sch_netem."
        )
    raise NetworkError(f"The network of the simulated Macs cannot be set up: `{' '.join(command)}` says: {said}.")
