"""HOST:PORT as gRPC and URLs take it, an IPv6 address in brackets (RFC 3986, `authority`); in whose network it is."""

import ipaddress
import socket
from urllib.parse import quote

LOCAL_NAMES = (".local", ".localhost", ".home.arpa")
"""Endings of names that never leave the local network (RFC 6762, 6761, 8375)."""


def authority(host: str, port: int) -> str:
    """`host:port`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def http_url(host: str, port: int) -> str:
    """`http://host:port`, without a path; the zone of an IPv6 address escaped (RFC 6874)."""
    return f"http://{authority(quote(host, safe=':'), port)}"


def family(host: str) -> socket.AddressFamily:
    """Of sockets for `host`, an address without brackets or a name that has an IPv4 one."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def host_of(address: str) -> str:
    """The host of HOST:PORT, without brackets."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is reached from this machine only."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_local(host: str) -> bool:
    """Whether `host`, without brackets, is an address or a name of this machine or its own network, not of the
    Internet's. Asks no name server."""
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        name = host.lower().removesuffix(".")
        return "." not in name or name.endswith(LOCAL_NAMES)
