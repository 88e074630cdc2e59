"""Ten minutes of clients that read slowly, leave, send too much or say nothing: an endpoint's memory, and its word.

    `pomarium serve`, two ingresses, stub engines that say a token each 20 ms (endpoint_sides.py, endpoint_worker.py)
        <--each kind of CLIENTS, so many at once, one after the other--> Tally: what each met
        each LOOK_S: bytes of its own and connections of each process --> growth from the first third to the last
        at the end nobody asks any more --> engines say nothing within REST_S

Its exit status is 1 if a process grew by more than GROWTH, a request ended otherwise than it should, or an engine went
on for a client that had left.

    python benchmarks/endpoint_soak.py [--minutes 10] [--seed 0]
"""

import argparse
import asyncio
import contextlib
import json
import random
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from endpoint import say, write_model
from endpoint_sides import ENDPOINT_KINDS, MODEL, POMARIUM, Running, Side, kind_of, running
from report import table

from pomarium.cluster.node import kin

LOOK_S = 10.0
GROWTH = 32 << 20
"""Bytes. Python's allocator keeps what a busy minute took, up to some MiB."""
REST_S = 30.0
"""For what a client left to end, and for Ray to export it: each 10 s or so."""
END = b"data: [DONE]"
MOST_TOKENS = 1800
PATIENCE_S = 120.0
TINY_BUFFER = 4096
"""Bytes that a slow client's system keeps for it: the least that Linux gives, doubled."""


@dataclass
class Tally:
    """What clients met. wrong: what should not have happened, as sentences."""

    met: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def expect(self, kind: str, good: bool, said: str) -> None:
        """Of one request."""
        self.met[kind] += 1
        if not good:
            self.wrong.append(f"{kind}: {said}")


@dataclass(frozen=True)
class Place:
    """Where clients ask, and what chance decides."""

    port: int
    chance: random.Random
    tally: Tally

    async def connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection."""
        return await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24)

    def request(self, tokens: int, prompt: str = "once", **fields: object) -> bytes:
        """A streamed completion of so many tokens."""
        asked = {"model": MODEL, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True} | fields
        body = json.dumps(asked).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        return f"{head}\r\n\r\n".encode() + body


async def reads(place: Place) -> None:
    """Reads an answer to its end."""
    reader, writer = await place.connected()
    with contextlib.closing(writer):
        writer.write(place.request(place.chance.randint(1, 400)))
        answer = await asyncio.wait_for(reader.readuntil(END), PATIENCE_S)
    place.tally.expect("reads", b" 200 " in answer[:20] and b'"error"' not in answer, repr(answer[-300:]))


async def reads_slowly(place: Place) -> None:
    """Takes less than it is sent, and leaves before the end."""
    plain = socket.socket()
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TINY_BUFFER)
    plain.setblocking(False)
    with plain:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(plain, ("127.0.0.1", place.port))
        await loop.sock_sendall(plain, place.request(MOST_TOKENS, logprobs=20))
        begun = await asyncio.wait_for(loop.sock_recv(plain, 512), PATIENCE_S)
        for _ in range(place.chance.randint(10, 40)):
            await asyncio.sleep(1)
            await asyncio.wait_for(loop.sock_recv(plain, 512), PATIENCE_S)
    place.tally.expect("reads slowly", b" 200 " in begun[:20], repr(begun[:100]))


async def leaves(place: Place) -> None:
    """Leaves: in the middle of its request, before the answer, or in the middle of that."""
    _, writer = await place.connected()
    with contextlib.closing(writer):
        request = place.request(MOST_TOKENS)
        writer.write(request[: place.chance.choice([20, len(request) - 5, len(request), len(request)])])
        await asyncio.sleep(place.chance.choice([0.0, 0.01, 0.1, 1.0, 3.0]))
    place.tally.expect("leaves", True, "")


async def sends_too_much(place: Place) -> None:
    """Sends a body that no engine takes, or that is not even read."""
    reader, writer = await place.connected()
    size = place.chance.choice([1 << 20, 7 << 20, 9 << 20])
    with contextlib.closing(writer):
        writer.write(place.request(1, prompt="x " * (size // 2)))
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        status = await asyncio.wait_for(reader.readline(), PATIENCE_S)
    refused = b" 413 " if size > 8 << 20 else b" 400 "
    place.tally.expect("sends too much", refused in status, f"{size} bytes: {status!r}")
    await asyncio.sleep(1)


async def stays_idle(place: Place) -> None:
    """Asks something small, and keeps its connection without a word."""
    reader, writer = await place.connected()
    with contextlib.closing(writer):
        for _ in range(2):
            writer.write(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_S)
            (size,) = [int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: ")]
            await asyncio.wait_for(reader.readexactly(size), PATIENCE_S)
            place.tally.expect("stays idle", b" 200 " in head[:20], repr(head[:100]))
            await asyncio.sleep(place.chance.uniform(20, 60))


Client = Callable[[Place], Awaitable[None]]
CLIENTS: Mapping[Client, int] = {reads: 12, reads_slowly: 8, leaves: 6, sends_too_much: 2, stays_idle: 200}
"""How many of each kind there are at once."""


@dataclass(frozen=True)
class Look:
    """At one time: bytes of its own, by process and kind; connections of clients to all ingresses."""

    at: float
    held: Mapping[str, int]
    connections: int


def look(side: Running, began: float) -> Look:
    """Now. Sockets that are being closed count as connections of nobody."""
    held, connections = {}, 0
    for process in kin.members(side.kin):
        with contextlib.suppress(psutil.Error):
            kind = kind_of(" ".join(process.cmdline()), POMARIUM)
            if kind not in ENDPOINT_KINDS:
                continue
            held[f"{kind} {process.pid}"] = process.memory_full_info().uss
            found = process.net_connections("tcp4")
            connections += sum(1 for c in found if c.laddr.port == side.port and c.status == psutil.CONN_ESTABLISHED)
    return Look(time.monotonic() - began, held, connections)


async def one_after_the_other(client: Client, place: Place, until: float) -> None:
    """Clients of a kind."""
    while time.monotonic() < until:
        try:
            await client(place)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            place.tally.expect(client.__name__.replace("_", " "), False, f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)


async def soak(side: Running, minutes: float, seed: int) -> tuple[Tally, list[Look]]:
    """All of them for so long."""
    tally, looks, began = Tally(), [], time.monotonic()
    until = began + 60 * minutes
    place = Place(side.port, random.Random(seed), tally)
    clients = [
        asyncio.create_task(one_after_the_other(client, place, until))
        for client, count in CLIENTS.items()
        for _ in range(count)
    ]
    while time.monotonic() < until:
        await asyncio.sleep(LOOK_S)
        looks.append(await asyncio.to_thread(look, side, began))
        say(f"{looks[-1].at:.0f} s: {looks[-1].connections} connections, {sum(tally.met.values())} requests")
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    return tally, looks


def generated(port: int) -> float:
    """Tokens that the engines have said."""
    page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30, trust_env=False).text
    lines = [line for line in page.splitlines() if line.startswith("ray_vllm_generation_tokens_total{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def growth(looks: list[Look]) -> dict[str, tuple[float, float]]:
    """Of each process that was there all the time: median bytes in the first third, and in the last."""
    third = max(1, len(looks) // 3)
    found: dict[str, list[list[int]]] = defaultdict(lambda: [[], []])
    for at, part in enumerate((looks[:third], looks[-third:])):
        for one in part:
            for name, held in one.held.items():
                found[name][at].append(held)
    return {n: (statistics.median(a), statistics.median(b)) for n, (a, b) in found.items() if a and b}


def main() -> None:
    """Soak, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        write_model(folder / "model")
        side = Side(POMARIUM, engines=2, stub=True, words=("--ingresses=2",))
        with running(side, folder / "model", folder, say) as started:
            tally, looks = asyncio.run(soak(started, options.minutes, options.seed))
            time.sleep(REST_S)
            said = [generated(started.port)]
            time.sleep(REST_S)
            said.append(generated(started.port))
    grown = growth(looks)
    print(
        f"{options.minutes:g} minutes, clients at once: {', '.join(f'{n} x {c.__name__}' for c, n in CLIENTS.items())}"
    )
    print(table(["requests", ""], [[kind.replace("_", " "), str(count)] for kind, count in tally.met.most_common()]))
    rows = [[name, f"{a / 2**20:.0f}", f"{b / 2**20:.0f}"] for name, (a, b) in sorted(grown.items())]
    print(table(["MiB of its own, median", "first third", "last third"], rows))
    faults = [*tally.wrong[:20]]
    faults += [f"{name} grew by {(b - a) / 2**20:.0f} MiB" for name, (a, b) in grown.items() if b - a > GROWTH]
    if said[0] != said[1]:
        faults.append(f"engines went on for clients that had left: {said[1] - said[0]:.0f} tokens")
    print("\n".join(faults) if faults else "all as it should be")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
