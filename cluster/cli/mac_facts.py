"""What macOS says of a Mac that is to serve: its version, power settings, firewall and access to the local network.

    pmset, socketfilterfw, route, sysctl, a connection --gather--> texts --parsers--> MacFacts, for doctor_mac.py

The parsers are pure; their texts are tried with tests/darwin/doctor.
"""

import platform
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from pomarium.cluster.machine.commands import said
from pomarium.worker import local_network

CONNECT_S = 2.0
SOCKETFILTERFW = "/usr/libexec/ApplicationFirewall/socketfilterfw"
PROBED_PORT = 80
"""Of the router; that nothing listens there is an answer too."""

Ask = Callable[[Sequence[str]], str]


class Firewall(StrEnum):
    """State of macOS's application firewall."""

    OFF = "off"
    ON = "on"
    BLOCKS_ALL = "blocks all"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class MacFacts:
    """What the checks judge.

    Attributes:
        version: of macOS, such as (15, 6, 1); () if unknown.
        translated: whether this Python runs under Rosetta.
        power: `pmset -g`'s settings in use, name -> number.
        gateway: address of the router; None without a network. unreachable: whether a connection to it has no route.
    """

    version: tuple[int, ...]
    translated: bool
    power: Mapping[str, int]
    firewall: Firewall
    gateway: str | None
    unreachable: bool


def gather(ask: Ask | None = None) -> MacFacts:
    """Look at this Mac."""
    asked = ask or said
    route = gateway(asked(["route", "-n", "get", "default"]))
    return MacFacts(
        version=version(platform.mac_ver()[0]),
        translated=asked(["sysctl", "-n", "sysctl.proc_translated"]).strip() == "1",
        power=power(asked(["pmset", "-g"])),
        firewall=firewall(asked([SOCKETFILTERFW, "--getglobalstate", "--getblockall"])),
        gateway=route,
        unreachable=route is not None and no_route(route),
    )


def version(text: str) -> tuple[int, ...]:
    """(15, 6, 1) of "15.6.1"."""
    return tuple(int(number) for number in re.findall(r"\d+", text))


def power(text: str) -> dict[str, int]:
    """Settings of `pmset -g`; what is no number, and what keeps the Mac awake now, is left out."""
    found = re.findall(r"^ (\S+(?: \S+)*?) +(\d+)(?: \(.*\))?$", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


def firewall(text: str) -> Firewall:
    """Of `socketfilterfw --getglobalstate --getblockall`."""
    state = re.search(r"\(State = (\d)\)", text)
    if state is None:
        return Firewall.UNKNOWN
    if state[1] == "0":
        return Firewall.OFF
    blocks = state[1] == "2" or re.search(r"block all (state set to )?enabled", text, re.IGNORECASE) is not None
    return Firewall.BLOCKS_ALL if blocks else Firewall.ON


def gateway(text: str) -> str | None:
    """The router's IPv4 address of `route -n get default`; None without one."""
    match = re.search(r"^\s*gateway: (\d+\.\d+\.\d+\.\d+)\s*$", text, re.MULTILINE)
    return match[1] if match else None


def no_route(address: str, port: int = PROBED_PORT) -> bool:
    """Whether a connection fails with EHOSTUNREACH, as macOS answers without Local Network access."""
    fault = local_network.fault(address, port, CONNECT_S)
    return fault is not None and local_network.is_unreachable(fault)
