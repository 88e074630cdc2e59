"""Wake-up packets: their bytes, where they go, and that they arrive, on loopback and between network namespaces."""

import ipaddress
import json
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.autoscaling.wake_on_lan import (
    LIMITED_BROADCAST,
    Interface,
    Target,
    destinations,
    magic_packet,
    read_interfaces,
    send,
)
from pomarium.cluster.rack import netns
from pomarium.worker.errors import SettingsError

HARDWARE = "a4:83:e7:00:12:9f"
LOOPBACK = Interface("127.0.0.1", "255.0.0.0")
OFFICE = Interface("192.168.1.2", "255.255.255.0")
RACK = Interface("10.0.4.2", "255.255.252.0")
TUNNEL = Interface("10.8.0.6", "255.255.255.255")
WAIT_S = 10.0


# --- the packet -----------------------------------------------------------------------------------------------------


def test_the_packet_is_the_one_of_the_white_paper() -> None:
    address = b"\xa4\x83\xe7\x00\x12\x9f"
    assert magic_packet(HARDWARE) == b"\xff\xff\xff\xff\xff\xff" + address * 16
    assert len(magic_packet(HARDWARE)) == 102


def address_in(frame: bytes) -> bytes:
    """What an adapter looks for: six bytes of ones anywhere, then the same six bytes sixteen times."""
    for start in range(len(frame)):
        begin = start + 6
        if frame[start:begin] == b"\xff" * 6 and frame[begin : begin + 96] == frame[begin : begin + 6] * 16:
            return frame[begin : begin + 6]
    raise AssertionError("no magic packet")


@given(st.binary(min_size=6, max_size=6), st.binary(max_size=60).filter(lambda before: b"\xff" not in before))
def test_an_adapter_finds_its_address_in_a_frame(address: bytes, before: bytes) -> None:
    assert address_in(before + magic_packet(address.hex(":"))) == address


@pytest.mark.parametrize(
    "text",
    ["", "a4:83:e7:00:12", f"{HARDWARE}:00", f"{HARDWARE}\n", HARDWARE.upper(), HARDWARE.replace(":", "-"),
     HARDWARE.replace(":", ""), "a4:83:e7:00:12:9g", "a4:83:e7:00:12:٩٩", " a4:83:e7:00:12:9f"],
)  # fmt: skip
def test_what_is_no_hardware_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a hardware address such as"):
        magic_packet(text)


# --- where it goes --------------------------------------------------------------------------------------------------


def hosts(address: str, *interfaces: Interface) -> tuple[str, ...]:
    return tuple(host for host, _ in destinations(address, interfaces))


def test_a_packet_goes_to_the_mac_and_to_the_network_that_holds_it() -> None:
    machine = (LOOPBACK, OFFICE, RACK, TUNNEL)
    assert hosts("10.0.7.9", *machine) == ("10.0.7.9", "10.0.7.255", LIMITED_BROADCAST)
    assert hosts("192.168.1.9", *machine) == ("192.168.1.9", "192.168.1.255", LIMITED_BROADCAST)


def test_a_mac_of_no_known_network_is_called_on_all_of_them() -> None:
    everywhere = ("192.168.1.255", "10.0.7.255", LIMITED_BROADCAST)
    assert hosts("172.16.0.9", LOOPBACK, OFFICE, RACK, TUNNEL) == ("172.16.0.9", *everywhere)
    assert hosts("fe80::1", LOOPBACK, OFFICE, RACK, TUNNEL) == ("fe80::1", *everywhere)
    assert hosts("studio-1.local", LOOPBACK, OFFICE, RACK, TUNNEL) == everywhere, "a name that did not resolve"


def test_a_network_is_called_once() -> None:
    second = Interface("192.168.1.3", "255.255.255.0")
    assert hosts("192.168.1.9", OFFICE, second) == ("192.168.1.9", "192.168.1.255", LIMITED_BROADCAST)


@pytest.mark.parametrize("netmask", ["255.255.255.254", "255.255.255.255"])
def test_a_network_of_two_has_no_broadcast(netmask: str) -> None:
    assert hosts("10.8.0.6", Interface("10.8.0.6", netmask)) == ("10.8.0.6", LIMITED_BROADCAST)


@pytest.mark.parametrize("address", ["127.0.0.61", "::1"])
def test_a_simulated_mac_is_called_alone(address: str) -> None:
    assert hosts(address, LOOPBACK, OFFICE, RACK) == (address,)


@given(st.ip_addresses(v=4), st.integers(1, 30), st.integers(1, 65535))
def test_the_mac_comes_first_and_the_port_is_kept(address: object, prefix: int, port: int) -> None:
    netmask = ipaddress.IPv4Network((0, prefix)).netmask
    found = destinations(str(address), (Interface("10.0.4.2", str(netmask)),), port)
    assert found[0][0] == str(address)
    assert {number for _, number in found} == {port}


def test_this_machine_has_a_loopback_interface() -> None:
    found = [interface for interface in read_interfaces() if interface.address == "127.0.0.1"]
    assert found
    assert not any(interface.broadcasts for interface in found)


# --- over loopback --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("address", "bound"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1")])
def test_a_packet_arrives(address: str, bound: str) -> None:
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as receiver:
        try:
            receiver.bind((bound, 0))
        except OSError as error:
            pytest.skip(f"this machine has no {bound}: {error}")
        receiver.settimeout(WAIT_S)
        send(Target(HARDWARE, address), port=receiver.getsockname()[1])
        assert receiver.recv(200) == magic_packet(HARDWARE)


def test_a_wrong_hardware_address_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(ValueError, match="not a hardware address"):
        send(Target("studio-1", "127.0.0.1"))


# --- between network namespaces -------------------------------------------------------------------------------------

LISTEN = """
import json, socket
PKTINFO = 8  # of <linux/in.h>; Python has no name for it before 3.14
receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
receiver.setsockopt(socket.IPPROTO_IP, PKTINFO, 1)
receiver.bind(("", 9))
receiver.settimeout(10)
print("ready", flush=True)
while True:
    packet, ((_, _, info),), _, _ = receiver.recvmsg(200, 64)
    print(json.dumps([socket.inet_ntoa(info[8:12]), packet.hex()]), flush=True)
"""
SEND = """
import sys
from pomarium.cluster.autoscaling.wake_on_lan import Target, WakeError, send
try:
    send(Target(*sys.argv[1:]))
except WakeError as error:
    sys.exit(str(error))
"""


@dataclass(frozen=True)
class Segment:
    """Two namespaces joined by a pair of veth: 10.213.7.1/24, which sends, and 10.213.7.2/24, which listens."""

    here: str
    there: str

    def send(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = ["ip", "netns", "exec", self.here, sys.executable, "-c", SEND, *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def segment() -> Iterator[Segment]:
    try:
        netns.require()
    except SettingsError as error:
        pytest.skip(f"no network namespaces here: {error}")
    tag = secrets.token_hex(2)
    made = Segment(f"pmw{tag}-1", f"pmw{tag}-2")
    try:
        for name in (made.here, made.there):
            ip("netns", "add", name)
        ip("link", "add", "eth0", "netns", made.here, "type", "veth", "peer", "name", "eth0", "netns", made.there)
    except subprocess.CalledProcessError as error:
        remove(made)
        pytest.skip(f"this kernel gives no network namespaces: {error.stderr}")
    yield made
    remove(made)


def remove(segment: Segment) -> None:
    for name in (segment.here, segment.there):
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def connect(segment: Segment) -> None:
    for name, address in ((segment.here, "10.213.7.1/24"), (segment.there, "10.213.7.2/24")):
        ip("-netns", name, "address", "add", address, "broadcast", "+", "dev", "eth0")
        ip("-netns", name, "link", "set", "eth0", "up")


@pytest.fixture
def listener(segment: Segment) -> Iterator["subprocess.Popen[str]"]:
    connect(segment)
    command = ["ip", "netns", "exec", segment.there, sys.executable, "-c", LISTEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert heard(process) == "ready"
        yield process
        process.kill()


def heard(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_sleeping_mac_hears_the_broadcast(segment: Segment, listener: "subprocess.Popen[str]") -> None:
    """Nobody answers for the address of one that sleeps."""
    ip("-netns", segment.here, "route", "add", "default", "via", "10.213.7.2")
    done = segment.send(HARDWARE, "10.213.7.99")
    assert (done.returncode, done.stderr) == (0, "")
    found = [json.loads(heard(listener)) for _ in range(2)]
    assert found == [[host, magic_packet(HARDWARE).hex()] for host in ("10.213.7.255", LIMITED_BROADCAST)]


def test_a_name_that_nobody_knows_leaves_the_broadcasts(segment: Segment, listener: "subprocess.Popen[str]") -> None:
    """Nor does 255.255.255.255 go anywhere here, without a default route; one that goes is enough."""
    done = segment.send(HARDWARE, "studio-1.invalid")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(heard(listener)) == ["10.213.7.255", magic_packet(HARDWARE).hex()]


def test_without_a_network_nothing_can_be_sent(segment: Segment) -> None:
    done = segment.send(HARDWARE, "10.213.7.99")
    assert done.returncode == 1
    assert done.stderr.startswith("No packet to wake 10.213.7.99 could be sent (10.213.7.99: Network is unreachable, ")
    assert "255.255.255.255: Network is unreachable" in done.stderr
