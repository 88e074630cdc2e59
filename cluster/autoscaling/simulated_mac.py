"""A Mac of a simulated rack that sleeps: one process, which is its network adapter while it sleeps and its agent after.

    asleep: UDP socket --magic packet with its hardware address--> awake: agent.Agent, until the rack lets it sleep

Started by rack.simulate, one for each Mac: `python -m pomarium.cluster.autoscaling.simulated_mac RECORD NAME PORT`.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pomarium.cluster.autoscaling.agent import Agent
from pomarium.cluster.autoscaling.wake_on_lan import magic_packet
from pomarium.cluster.rack import current
from pomarium.cluster.rack.simulate import hardware_address

LONGEST_DATAGRAM = 2048


def await_packet(adapter: socket.socket, packet: bytes) -> None:
    """Return when a datagram with `packet` in it has come."""
    while packet not in adapter.recv(LONGEST_DATAGRAM):
        continue


def drop_waiting(adapter: socket.socket) -> None:
    """Forget the packets that came while the Mac was awake: an adapter heeds none then."""
    adapter.setblocking(False)
    try:
        while True:
            adapter.recv(LONGEST_DATAGRAM)
    except BlockingIOError:
        adapter.setblocking(True)


def say(line: str) -> None:
    """To the Mac's log, with Unix seconds."""
    print(f"{time.time():.3f} {line}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Sleep, wake, work, for as long as the process lives."""
    record, name, port = arguments
    rack = current.read(Path(record))
    index, spec = next((i, spec) for i, spec in enumerate(rack.nodes) if spec.name == name)
    os.environ.update(rack.membership.variables())
    packet = magic_packet(hardware_address(index))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as adapter:
        adapter.bind((spec.address, int(port)))

        def asleep() -> None:
            drop_waiting(adapter)
            say("asleep")
            await_packet(adapter, packet)
            say("awake")

        asleep()
        from pomarium.cluster.autoscaling.head_view import HeadView

        head = HeadView(rack.membership, say)
        Agent(spec, rack.membership, head, os.environ, asleep, say).run()


if __name__ == "__main__":
    main(sys.argv[1:])
