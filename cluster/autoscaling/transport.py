"""How a Mac is reached to wake it and to put it to sleep: by its own agent, or over ssh.

    keeper --wake: returns when all is done that can be; its node joins a little later-->  Transport
           --retire: the Mac's node ends and it falls asleep---------------------------->

Both begin a wake with Wake-on-LAN packets (wake_on_lan.py), sent again and again: a packet may be lost, and a Mac that
is just falling asleep misses it. An agent (`pomarium rack join HEAD --stay`) joins by itself and reads in rack.power
that it is to sleep, so there is nothing else to do for it. A Mac without one is told over ssh: `pomarium rack join`,
and later `pomarium rack down` and `pmset sleepnow`; if it refuses the latter it joins again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from pomarium.cluster.autoscaling import sleep, ssh, wake_on_lan
from pomarium.cluster.autoscaling.ssh import CommandError, SshHost
from pomarium.cluster.autoscaling.wake_on_lan import Target
from pomarium.cluster.rack.inventory import MacEntry
from pomarium.worker.errors import PomariumError

PACKET_S = 2.0
"""Between packets of one wake."""
ANSWER_S = 3.0
"""For one try to reach ssh."""
JOIN_S = 120.0
"""A node starts in seconds; a Mac that has just woken is busy."""
LEAVE_S = 60.0
ASLEEP_S = 30.0
"""A Mac sleeps some seconds after it was told to."""


class Transport(Protocol):
    """Reaches one Mac. Methods block: each call has a thread of its own."""

    def wake(self, wanted: Callable[[], bool]) -> None:
        """Wake the Mac and have it join; return when it did, or when it is no longer `wanted`.

        Raises PomariumError: it cannot be done.
        """

    def retire(self) -> None:
        """Have the Mac leave the rack and sleep. Raises PomariumError: it cannot be done."""


@dataclass(frozen=True)
class Agent:
    """A Mac that joins by itself once it is awake."""

    target: Target
    port: int

    def wake(self, wanted: Callable[[], bool]) -> None:
        """Packets until it has joined."""
        while wanted():
            wake_on_lan.send(self.target, self.port)
            time.sleep(PACKET_S)

    def retire(self) -> None:
        """It reads by itself that it is to sleep."""


@dataclass(frozen=True)
class Ssh:
    """A Mac on which commands are run. `program`: `pomarium` there. `head`: HOST:PORT that it joins."""

    target: Target
    port: int
    host: SshHost
    program: str
    head: str

    def wake(self, wanted: Callable[[], bool]) -> None:
        """Packets until ssh answers, then `rack join`."""
        while not ssh.answers(self.host, ANSWER_S):
            if not wanted():
                return
            wake_on_lan.send(self.target, self.port)
            time.sleep(PACKET_S)
        if wanted():
            self._join()

    def _join(self) -> None:
        """Out of its dark wake first, which lasts seconds."""
        words = (self.program, "rack", "join", self.head)
        ssh.run(self.host, ["/bin/sh", "-c", f'{sleep.ROUSE} >/dev/null 2>&1 & exec "$@"', "sh", *words], JOIN_S)

    def retire(self) -> None:
        """`rack down`, then sleep; where that is refused the Mac joins again, and SleepRefusedError is raised."""
        ssh.run(self.host, [self.program, "rack", "down"], LEAVE_S)
        try:
            self._fall_asleep()
        except sleep.SleepRefusedError:
            self._join()
            raise
        deadline = time.monotonic() + ASLEEP_S
        while ssh.answers(self.host, ANSWER_S) and time.monotonic() < deadline:  # a wake would take it for awake
            time.sleep(PACKET_S)

    def _fall_asleep(self) -> None:
        faults: list[str] = []
        for way in sleep.MAC_WAYS:
            try:
                ssh.run_and_part(self.host, way, LEAVE_S)
            except CommandError as error:
                faults.append(str(error).rstrip("."))
            else:
                return
        raise sleep.refused(faults)


def transport_of(mac: MacEntry, head: str, port: int) -> Transport:
    """How `mac` is reached: over ssh if rack.yaml names a user there, else by its agent.

    Args:
        head: HOST:PORT of Ray's head. port: that packets are sent to.

    Raises:
        PomariumError: it has no hardware address, so it cannot be woken.
    """
    if mac.hardware_address is None:
        raise PomariumError(
            f"{mac.name} has no hardware_address in rack.yaml, so it cannot be woken: add it, or name it in "
            "sleep.always_awake."
        )
    target = Target(mac.hardware_address, mac.address)
    if mac.ssh_user is None:
        return Agent(target, port)
    return Ssh(target, port, SshHost(mac.ssh_user, mac.address, mac.ssh_port), mac.program, head)
