"""How macOS keeps a program off the local network, as connections show it, and the cure in words.

    OSError, or the words of gRPC, Ray and ssh --is_unreachable--> --explained--> the reason, with the cure

From macOS 15 on a program needs the Local Network privilege to open a connection to an address of its own network
(Apple, TN3179, "Understanding local network privacy"). Without it `connect` fails at once with EHOSTUNREACH, as it does
where no machine has the address, and nobody is asked where no one sits at the screen. Daemons of launchd, programs of
root, and tools run from Terminal or over ssh have the privilege according to TN3179; others report that processes which
left root's rights, launchd's agents, and what outlives the ssh session that started it do not.
"""

import errno
import os
import socket
import sys

from pomarium.worker.address import host_of, is_local, is_loopback

SETTINGS = "System Settings > Privacy & Security > Local Network"
_WORDS = os.strerror(errno.EHOSTUNREACH).lower()
"""Of the system's message; gRPC, Ray and ssh hand it on inside of their own."""


def on_macos() -> bool:
    """Whether this system has that privilege."""
    return sys.platform == "darwin"


def fault(host: str, port: int, timeout_s: float) -> OSError | None:
    """What the system says of a TCP connection, its errno with it; None if something listens there."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except OSError as error:
        return error
    return None


def is_unreachable(fault: OSError | str) -> bool:
    """Whether a connection failed with EHOSTUNREACH, which on macOS also stands for a privilege that is lacking."""
    if isinstance(fault, OSError) and fault.errno is not None:
        return fault.errno == errno.EHOSTUNREACH
    return _WORDS in str(fault).lower()


def reason(fault: OSError) -> str:
    """In a few words, such as "No route to host"."""
    return fault.strerror or str(fault) or type(fault).__name__


def advice(fault: OSError | str, address: str) -> str:
    """What to do about a connection to HOST:PORT that failed so, a clause; "" where the privilege is not the matter."""
    if not on_macos() or not is_unreachable(fault) or is_loopback(address) or not is_local(host_of(address)):
        return ""
    return (
        "unless that machine is off, macOS keeps this process off the local network: allow the program that started it "
        f"(Terminal, Python) in {SETTINGS}, or run `deploy/install.sh --local-network NETWORK` and restart this Mac"
    )


def explained(text: str, address: str) -> str:
    """`text`, which says why a connection to HOST:PORT failed, with the advice if there is any."""
    clause = advice(text, address)
    return f"{text.rstrip('.')} ({clause})" if clause else text
