"""One port for several ingresses of a machine: one listening socket that all of them take connections from.

    the first: binds, listens --its descriptor (SCM_RIGHTS) over a Unix socket in `folder`--> each that comes later

Connections wait in one queue, and whoever is idle takes the next. What waits there outlives any one ingress, and the
port is open as long as one of them lives: one that is replaced goes on holding it while its successor starts. Several
sockets of one port (SO_REUSEPORT) have a queue each: macOS does not spread connections over them, and what waits in the
queue of one that dies is lost.
"""

import contextlib
import fcntl
import logging
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pomarium.cluster.machine import listening

logger = logging.getLogger(__name__)

ASK_S = 2.0
"""For another ingress to hand its socket on: one that is frozen does not."""

SUFFIX = ".port"


def take(folder: Path, host: str, port: int) -> socket.socket:
    """A socket that listens at `host`:`port`: another ingress's, or a new one. From now on others can take it here.

    Args:
        folder: of all ingresses of this endpoint on this machine; it is made, for its owner alone.

    Raises:
        OSError: somebody else listens there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with alone(folder):
        listener = _taken(folder, listening.resolved(host, port)[-1]) or listening.listener(host, port)
        giver = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        giver.bind(str(folder / f"{secrets.token_hex(4)}{SUFFIX}"))
        giver.listen()
    # A thread, for the loop that serves requests may be busy when another ingress starts.
    threading.Thread(target=_give, args=(giver, listener.dup()), name="shared port", daemon=True).start()
    return listener


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Of two processes that do this with one folder, one waits for the other."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _taken(folder: Path, address: tuple[object, ...]) -> socket.socket | None:
    for name in sorted(folder.glob(f"*{SUFFIX}")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(ASK_S)
            try:
                asking.connect(str(name))
                _, descriptors, _, _ = socket.recv_fds(asking, 1, 1)
            except ConnectionRefusedError:  # its process is gone
                name.unlink(missing_ok=True)
                continue
            except OSError as error:
                logger.warning("%s does not hand its port on: %s", name, error)
                continue
        for descriptor in descriptors:
            listener = socket.socket(fileno=descriptor)
            if listener.getsockname()[:2] == address[:2]:
                return listener
            listener.close()  # the endpoint has moved
    return None


def _give(giver: socket.socket, listener: socket.socket) -> None:
    while True:
        asking, _ = giver.accept()
        with asking, contextlib.suppress(OSError):
            socket.send_fds(asking, [b"."], [listener.fileno()])
