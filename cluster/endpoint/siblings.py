"""What the ingresses of one endpoint on one machine tell each other: the entries of their ledgers (ledger.py).

    whoever comes later connects to all that are there, by Unix sockets in `folder`
    each --snapshot, then entry after entry: u32 length, JSON--> the other: Ledger.hear

Nobody waits for it: an ingress that hears late routes by what it knows.
"""

import asyncio
import json
import logging
import secrets
import socket
import struct
from pathlib import Path

from pomarium.cluster.endpoint.ledger import Entry, Ledger
from pomarium.cluster.endpoint.shared_port import alone

logger = logging.getLogger(__name__)

SUFFIX = ".news"
LENGTH = struct.Struct("!I")
MOST_WAITING = 8 << 20
"""Bytes for one that does not read, such as one that is frozen; then it is told no more."""


class Siblings:
    """The others, as one ingress knows them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._heard: dict[asyncio.StreamWriter, int] = {}  # the number of the last entry of the snapshot that each got
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, folder: Path) -> None:
        """Meet those that are there, and whoever comes. `folder`: as shared_port.take made it. Raises OSError."""
        loop = asyncio.get_running_loop()
        own, others = await asyncio.to_thread(_enter, folder)
        self._server = await asyncio.start_unix_server(self._talk, sock=own)
        for other in others:
            try:
                reader, writer = await asyncio.open_unix_connection(str(other))
            except OSError:  # it has ended
                other.unlink(missing_ok=True)
                continue
            task = asyncio.create_task(self._talk(reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        def tell(entry: Entry, number: int) -> None:
            if self._heard:
                loop.call_soon_threadsafe(self._tell, entry, number)

        self._ledger.tell = tell

    @property
    def count(self) -> int:
        """How many others there are."""
        return len(self._heard)

    def _tell(self, entry: Entry, number: int) -> None:
        message = _packed(entry)
        for writer in [writer for writer, last in self._heard.items() if last < number]:
            writer.write(message)
            if writer.transport.get_write_buffer_size() > MOST_WAITING:
                writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Tell the other what it has to know, and hear it until it ends."""
        teller = secrets.token_hex(8)
        try:
            entries, self._heard[writer] = self._ledger.snapshot()
            writer.writelines([_packed(entry) for entry in entries])
            while True:
                (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
                self._ledger.hear(teller, Entry.of(json.loads(await reader.readexactly(length))))
        except (asyncio.IncompleteReadError, OSError):
            logger.info("another ingress has ended")
        except (ValueError, TypeError):
            logger.exception("another ingress, perhaps of another version, told what is no entry")
        finally:
            self._heard.pop(writer, None)
            self._ledger.gone(teller)
            writer.close()


def _packed(entry: Entry) -> bytes:
    content = json.dumps(entry.fields).encode()
    return LENGTH.pack(len(content)) + content


def _enter(folder: Path) -> tuple[socket.socket, list[Path]]:
    """A socket that the others find from now on, and theirs. Of two that enter, one finds the other."""
    with alone(folder):
        others = sorted(folder.glob(f"*{SUFFIX}"))
        own = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        own.bind(str(folder / f"{secrets.token_hex(4)}{SUFFIX}"))
        own.listen()
    return own, others
