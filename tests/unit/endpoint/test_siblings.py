"""Several ingresses of one endpoint: one port for all, and each knows what engines were sent by the others."""

import asyncio
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from pomarium.cluster.endpoint import shared_port, siblings
from pomarium.cluster.endpoint.ledger import Entry, Ledger, What
from pomarium.cluster.endpoint.siblings import Siblings
from pomarium.cluster.node import ports

PATIENCE_S = 60.0
HOLDER = """
import asyncio, sys
from pathlib import Path
from pomarium.cluster.endpoint import shared_port

async def tell(reader, writer):
    writer.write(sys.argv[3].encode())
    writer.close()

async def serve():
    listener = shared_port.take(Path(sys.argv[1]), "127.0.0.1", int(sys.argv[2]))
    await asyncio.start_server(tell, sock=listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.get_running_loop().create_future()

asyncio.run(serve())
"""


class Holder:
    """A process that takes a port, and tells each caller its name."""

    def __init__(self, folder: Path, port: int, name: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), str(port), name], stdout=subprocess.PIPE, text=True
        )

    def port(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE_S)


def load(ledger: Ledger, replica: str) -> int:
    """Requests that it was sent and that are not over."""
    return ledger.candidates("engine:m", [replica], [])[0].load


def matched(ledger: Ledger, replica: str, keys: list[int]) -> int:
    """How many leading ones of `keys` it has read."""
    return ledger.candidates("engine:m", [replica], keys)[0].matched


def called(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as client:
        return client.recv(100).decode()


def test_a_port_outlives_each_of_its_holders(tmp_path: Path) -> None:
    folder, port = tmp_path / "p", ports.free(1)[0]
    first = Holder(folder, port, "first")
    try:
        assert first.port() == port
        assert called(port) == "first"
        assert (folder.stat().st_mode & 0o777, len(list(folder.glob("*.port")))) == (0o700, 1)
        second = Holder(folder, port, "second")
        assert second.port() == port
        first.kill()
        assert called(port) == "second", "nobody was refused"
        first = Holder(folder, port, "third")
        assert first.port() == port
        second.kill()
        assert called(port) == "third"
    finally:
        first.kill()
        second.kill()


def test_what_waits_is_answered_by_whoever_is_left(tmp_path: Path) -> None:
    port = ports.free(1)[0]
    first, second = Holder(tmp_path, port, "first"), Holder(tmp_path, port, "second")
    try:
        assert first.port() == second.port() == port
        for holder in (first, second):
            holder.process.send_signal(signal.SIGSTOP)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as waiting:
            first.kill()
            second.process.send_signal(signal.SIGCONT)
            assert waiting.recv(100) == b"second"
    finally:
        first.kill()
        second.kill()


def test_another_s_port_and_another_address_are_not_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(OSError, match="in use"):
            shared_port.take(tmp_path / "a", "127.0.0.1", other.getsockname()[1])
    port = ports.free(1)[0]
    held = shared_port.take(tmp_path / "b", "127.0.0.1", port)
    again = shared_port.take(tmp_path / "b", "127.0.0.1", port)
    assert held.getsockname() == again.getsockname()
    elsewhere = shared_port.take(tmp_path / "b", "127.0.0.1", ports.free(1)[0])
    assert elsewhere.getsockname() != held.getsockname()


def test_a_frozen_holder_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_port, "ASK_S", 0.5)
    port = ports.free(1)[0]
    frozen, well = Holder(tmp_path, port, "frozen"), Holder(tmp_path, port, "well")
    try:
        assert frozen.port() == well.port() == port
        frozen.process.send_signal(signal.SIGSTOP)
        assert shared_port.take(tmp_path, "127.0.0.1", port).getsockname()[1] == port
    finally:
        frozen.kill()
        well.kill()


# --- what they tell each other --------------------------------------------------------------------------------------


def sent(replica: str) -> Entry:
    return Entry(What.SENT, "engine:m", replica)


def over(replica: str) -> Entry:
    return Entry(What.OVER, "engine:m", replica)


def read(replica: str, *keys: int) -> Entry:
    return Entry(What.READ, "engine:m", replica, keys)


async def until(found: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not found():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def joined(folder: Path, ledger: Ledger) -> Siblings:
    made = Siblings(ledger)
    await made.start(folder)
    return made


def test_each_hears_all_others_also_those_that_came_before_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledgers = [Ledger() for _ in range(3)]
        first = await joined(tmp_path, ledgers[0])
        ledgers[0].write(sent("a"))
        ledgers[0].write(sent("a"))
        ledgers[0].write(over("a"))
        ledgers[0].write(read("a", 1, 2, 3))
        second, third = await asyncio.gather(*(joined(tmp_path, ledger) for ledger in ledgers[1:]))
        await until(lambda: all(one.count == 2 for one in (first, second, third)))
        ledgers[2].write(sent("a"))
        ledgers[1].write(sent("b"))
        ledgers[1].write(read("b", 7))
        for ledger in ledgers:
            await until(lambda ledger=ledger: (load(ledger, "a"), load(ledger, "b")) == (2, 1))
            await until(lambda ledger=ledger: matched(ledger, "b", [7]) == 1)
            assert matched(ledger, "a", [1, 2, 3, 4]) == 3
        ledgers[0].write(over("a"))
        await until(lambda: load(ledgers[2], "a") == 1)

    asyncio.run(scenario())


def tell_and_stay(folder: str) -> None:
    async def scenario() -> None:
        ledger = Ledger()
        ledger.write(sent("a"))
        await joined(Path(folder), ledger)
        await asyncio.sleep(PATIENCE_S)

    asyncio.run(scenario())


def test_what_one_asked_that_was_killed_is_no_load_and_what_it_taught_stays(tmp_path: Path) -> None:
    async def scenario() -> None:
        ledger = Ledger()
        own = await joined(tmp_path, ledger)
        other = multiprocessing.get_context("spawn").Process(target=tell_and_stay, args=(str(tmp_path),))
        other.start()
        try:
            await until(lambda: load(ledger, "a") == 1)
            assert own.count == 1
        finally:
            assert other.pid is not None
            os.kill(other.pid, signal.SIGKILL)
            other.join()
        await until(lambda: own.count == 0)
        assert load(ledger, "a") == 0
        ledger.write(sent("a"))
        assert load(ledger, "a") == 1
        await joined(tmp_path, Ledger())
        assert len(list(tmp_path.glob("*.news"))) == 2, "the name of the dead one is gone"

    asyncio.run(scenario())


@asynccontextmanager
async def deaf(folder: Path) -> AsyncIterator[None]:
    """Somebody who connects and reads nothing."""
    (name,) = folder.glob("*.news")
    reader, writer = await asyncio.open_unix_connection(str(name), limit=1)
    reader._transport.pause_reading()  # type: ignore[attr-defined]
    yield
    writer.close()


def test_one_that_does_not_read_is_told_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(siblings, "MOST_WAITING", 10_000)

    async def scenario() -> None:
        ledger = Ledger()
        own = await joined(tmp_path, ledger)
        async with deaf(tmp_path):
            await until(lambda: own.count == 1)
            entry = read("a", *range(1000))
            for _ in range(2000):
                ledger.write(entry)
                await asyncio.sleep(0)
            await until(lambda: own.count == 0)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "message", [b"[]", b"{", b'["sent", "m", "a"]', b'["no", "m", "a", []]', b'["read", "m", "a", 3]']
)
def test_what_is_no_entry_ends_that_connection_alone(tmp_path: Path, message: bytes) -> None:
    async def scenario() -> None:
        ledger = Ledger()
        own = await joined(tmp_path, ledger)
        (name,) = tmp_path.glob("*.news")
        reader, writer = await asyncio.open_unix_connection(str(name))
        await until(lambda: own.count == 1)
        writer.write(siblings.LENGTH.pack(len(message)) + message)
        assert await reader.read() == b""
        await until(lambda: own.count == 0)

    asyncio.run(scenario())


def test_replicas_that_are_gone_are_forgotten() -> None:
    ledger = Ledger()
    for replica in "ab":
        ledger.write(sent(replica))
        ledger.write(read(replica, 1))
    ledger.keep("engine:other", set())
    ledger.keep("engine:m", {"b"})
    assert [load(ledger, replica) for replica in "ab"] == [0, 1]
    assert [matched(ledger, replica, [1]) for replica in "ab"] == [0, 1]
    ledger.write(over("a"))
    assert load(ledger, "a") == 0, "its last request ends after it"
