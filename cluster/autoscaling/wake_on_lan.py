"""Waking a sleeping Mac: the magic packet and where it has to go, for a Mac that sleeps has no address of its own.

    Target, Interface ... --destinations (pure)--> (address, port) ... --send--> UDP, one packet to each

Nothing answers a magic packet and the network may lose it: whoever wakes a Mac sends it again until the Mac is up. It
goes no further than the Ethernet segment, and a Mac heeds it if "Wake for network access" is on in its Energy settings.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from pomarium.worker import local_network
from pomarium.worker.address import authority, family
from pomarium.worker.errors import PomariumError

DISCARD_PORT = 9
"""RFC 863. An adapter looks for the pattern anywhere in a frame: the port matters only to firewalls."""
LIMITED_BROADCAST = "255.255.255.255"
"""RFC 919: the segment that the default route leaves through."""

_HARDWARE = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")

Destination = tuple[str, int]


class WakeError(PomariumError):
    """No packet could be sent to anywhere."""


@dataclass(frozen=True)
class Target:
    """A Mac to wake. hardware_address: such as a4:83:e7:00:12:9f. address: IP address or host name, of rack.yaml."""

    hardware_address: str
    address: str


@dataclass(frozen=True)
class Interface:
    """An IPv4 address of this machine, with its netmask: both dotted, as in 192.168.1.2 and 255.255.255.0."""

    address: str
    netmask: str

    @property
    def network(self) -> ipaddress.IPv4Network:
        """Of the addresses that are reached without a router."""
        return ipaddress.IPv4Network((self.address, self.netmask), strict=False)

    @property
    def broadcasts(self) -> bool:
        """Whether others share the network: neither a loopback nor a point-to-point interface, as of a VPN."""
        return not self.network.is_loopback and self.network.prefixlen < 31


def magic_packet(hardware_address: str) -> bytes:
    """The 102 bytes that wake the adapter of that address: AMD, Magic Packet Technology, publication 20213.

    Raises ValueError for what is not six lower-case bytes such as a4:83:e7:00:12:9f.
    """
    if not _HARDWARE.fullmatch(hardware_address):
        raise ValueError(f"{hardware_address!r} is not a hardware address such as a4:83:e7:00:12:9f")
    return b"\xff" * 6 + bytes.fromhex(hardware_address.replace(":", "")) * 16


def destinations(address: str, interfaces: Sequence[Interface], port: int = DISCARD_PORT) -> tuple[Destination, ...]:
    """Where a packet for the Mac of that address goes, each once, the likeliest first.

    Its own address works while the switch and this machine still remember where it was. Then the broadcast of the
    network that holds it, or of each network of this machine if none does, and that of the default route. A loopback
    address is of a simulated Mac and stands alone; what is no address is a name that did not resolve: broadcasts only.
    """
    found = _ip(address)
    if found is not None and found.is_loopback:
        return ((str(found), port),)
    shared = [interface.network for interface in interfaces if interface.broadcasts]
    near = [network for network in shared if found is not None and found in network] or shared
    own = [] if found is None else [str(found)]
    hosts = [*own, *(str(network.broadcast_address) for network in near), LIMITED_BROADCAST]
    return tuple((host, port) for host in dict.fromkeys(hosts))


def read_interfaces() -> tuple[Interface, ...]:
    """The IPv4 addresses of this machine now; those without a netmask have no broadcast and are left out."""
    return tuple(
        Interface(entry.address, entry.netmask)
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family == socket.AF_INET and entry.netmask is not None
    )


def send(target: Target, port: int = DISCARD_PORT, interfaces: Sequence[Interface] | None = None) -> None:
    """One packet to each destination, as seen from `interfaces`, by default those that the machine has now.

    Looking a host name up takes as long as the system's resolver lets it: seconds, if nobody knows the name.

    Raises:
        WakeError: not one could be sent. ValueError: the hardware address is none.
    """
    packet = magic_packet(target.hardware_address)
    seen = read_interfaces() if interfaces is None else interfaces
    places = [place for host in _resolve(target.address) for place in destinations(host, seen, port)]
    faults = {host: _send_to(packet, (host, number)) for host, number in dict.fromkeys(places)}
    if None not in faults.values():
        reasons = local_network.explained(
            ", ".join(f"{host}: {fault}" for host, fault in faults.items()), authority(target.address, port)
        )
        raise WakeError(
            f"No packet to wake {target.address} could be sent ({reasons}): connect this machine to the Macs' network."
        )


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _resolve(address: str) -> tuple[str, ...]:
    """The IPv4 addresses of a name; what is an address already, or a name that nobody knows, as it is."""
    if _ip(address) is not None:
        return (address,)
    try:
        found = socket.getaddrinfo(address, None, socket.AF_INET, socket.SOCK_DGRAM)
    except socket.gaierror:
        return (address,)
    return tuple(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def _send_to(packet: bytes, place: Destination) -> str | None:
    """Why the system would not send it; None if it did."""
    try:
        with socket.socket(family(place[0]), socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sender.sendto(packet, place)
    except OSError as error:
        return error.strerror or str(error)
    return None
