"""What one hop between stages costs: our handoff beside raw TCP, a bare gRPC echo and a Ray actor call.

    payload --system--> peer (a process of its own) --64 bytes--> back: one hop, timed by the sender

All systems run in one go, in interleaved rounds, over loopback, so that what else the machine does falls on all alike.
`handoff` ends with the receiver's acknowledgement; `handoff, token` with a 64-byte tensor that a stage loop sends back
over a second link after it has taken the payload out as an MLX array: what a decode step waits for.

    python benchmarks/handoff.py [--seconds 15] [--no-ray] [--json FILE]
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import mlx.core as mx
import numpy as np
import psutil

from pomarium.worker.handoff.errors import LinkClosedError
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings

SIZES = {"16 KiB": 16 << 10, "64 KiB": 64 << 10, "1 MiB": 1 << 20, "32 MiB": 32 << 20}
ACK = bytes(64)
LOOPBACK = "127.0.0.1"
NODES = ("127.0.0.2", "127.0.0.11")
"""Of Ray, which rewrites 127.0.0.1 to the machine's address."""
ECHO = "/bare/Echo"
GRPC_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
WAIT_S = 30.0
TOKEN, EPOCH = "benchmark", 1

Hop = Callable[[], object]
System = Callable[[int], Hop]
"""Takes a payload's size, prepares it, and returns what sends it and waits for the answer."""


@dataclass(frozen=True)
class Row:
    """One system at one size; times in microseconds."""

    system: str
    size: str
    hops: int
    p50_us: float
    p99_us: float


def tcp_peer(pipe: Connection) -> None:
    """Reads a length and that many bytes, answers with 64."""
    with socket.create_server((LOOPBACK, 0)) as server:
        pipe.send(server.getsockname()[1])
        peer, _ = server.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(max(SIZES.values())))
        while head := peer.recv(4, socket.MSG_WAITALL):
            left = struct.unpack("<I", head)[0]
            while left:
                left -= peer.recv_into(buffer, left)
            peer.sendall(ACK)


def grpc_peer(pipe: Connection) -> None:
    """Answers each message of a stream with 64 bytes, on the thread that reads them."""

    def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            yield ACK

    service, method = ECHO.strip("/").split("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(echo, None, None)}
    server = grpc.server(ThreadPoolExecutor(2), options=GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    pipe.send(server.add_insecure_port(f"{LOOPBACK}:0"))
    server.start()
    server.wait_for_termination()


def stage_peer(pipe: Connection, settings: HandoffSettings) -> None:
    """A stage loop: takes each step as arrays, sends 64 bytes to the address that it was given, if any."""
    server = HandoffServer(f"{LOOPBACK}:0", EPOCH, TOKEN, settings=settings)
    inbox = server.inbox(0)
    pipe.send(server.address)
    back = pipe.recv()
    tokens = Outbox.connect(back, 1, EPOCH, TOKEN, settings=settings) if back else None
    ids = mx.zeros(16, mx.int32)
    with contextlib.suppress(LinkClosedError):
        for step in itertools.count():
            inbox.receive(step, 10 * WAIT_S)
            if tokens is not None:
                tokens.send(step, {"tokens": ids})


def start(stack: contextlib.ExitStack, peer: Callable[..., None], *args: object) -> Connection:
    """Runs `peer` in a process of its own until the stack ends."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=peer, args=(theirs, *args), daemon=True)
    process.start()
    stack.callback(process.join)
    stack.callback(process.kill)
    return ours


def tcp(stack: contextlib.ExitStack) -> System:
    port = start(stack, tcp_peer).recv()
    link = stack.enter_context(socket.create_connection((LOOPBACK, port)))
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def prepare(size: int) -> Hop:
        payload, head = os.urandom(size), struct.pack("<I", size)

        def hop() -> None:
            link.sendall(head)
            link.sendall(payload)
            link.recv(len(ACK), socket.MSG_WAITALL)

        return hop

    return prepare


def bare_grpc(stack: contextlib.ExitStack) -> System:
    port = start(stack, grpc_peer).recv()
    channel = stack.enter_context(grpc.insecure_channel(f"{LOOPBACK}:{port}", GRPC_OPTIONS))
    requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    answers = channel.stream_stream(ECHO, None, None)(iter(requests.get, None))
    stack.callback(requests.put, None)

    def prepare(size: int) -> Hop:
        payload = os.urandom(size)

        def hop() -> None:
            requests.put(payload)
            next(answers)

        return hop

    return prepare


def acknowledged(stack: contextlib.ExitStack, settings: HandoffSettings) -> System:
    pipe = start(stack, stage_peer, settings)
    link = Outbox.connect(pipe.recv(), 0, EPOCH, TOKEN, settings=settings)
    stack.callback(link.close)
    pipe.send("")
    steps = itertools.count()

    def prepare(size: int) -> Hop:
        arrays = hidden(size)

        def hop() -> None:
            link.send(next(steps), arrays, WAIT_S)
            if not link.flush(WAIT_S):
                raise TimeoutError("no acknowledgement")

        return hop

    return prepare


def with_token(stack: contextlib.ExitStack, settings: HandoffSettings) -> System:
    server = HandoffServer(f"{LOOPBACK}:0", EPOCH, TOKEN, settings=settings)
    stack.callback(server.close)
    inbox = server.inbox(1)
    pipe = start(stack, stage_peer, settings)
    link = Outbox.connect(pipe.recv(), 0, EPOCH, TOKEN, settings=settings)
    stack.callback(link.close)
    pipe.send(server.address)
    steps = itertools.count()

    def prepare(size: int) -> Hop:
        arrays = hidden(size)

        def hop() -> None:
            step = next(steps)
            link.send(step, arrays, WAIT_S)
            inbox.receive(step, WAIT_S)

        return hop

    return prepare


def hidden(size: int) -> dict[str, mx.array]:
    """An evaluated bf16 array of `size` bytes."""
    array = mx.array(np.frombuffer(os.urandom(size), np.uint16)).view(mx.bfloat16)
    mx.eval(array)
    return {"hidden": array}


def ray_actor(stack: contextlib.ExitStack) -> System:
    """A call to an actor on another node: each address of loopback has a raylet and an object store of its own."""
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pmb", dir="/tmp", ignore_cleanup_errors=True))
    os.environ |= {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with socket.create_server((NODES[0], 0)) as free:
        head = f"{NODES[0]}:{free.getsockname()[1]}"
    raylet(stack, NODES[0], "--head", f"--port={head.rpartition(':')[2]}", "--include-dashboard=false")
    wait_for(head)
    raylet(stack, NODES[1], f"--address={head}", '--resources={"peer": 1}')
    import ray

    ray.init(address=head, _node_ip_address=NODES[0], logging_level="ERROR", log_to_driver=False)
    stack.callback(ray.shutdown)

    @ray.remote(num_cpus=0, resources={"peer": 1})
    class Peer:
        def take(self, payload: Any) -> bytes:
            return ACK

    peer = Peer.remote()
    ray.get(peer.take.remote(b""), timeout=2 * WAIT_S)

    def prepare(size: int) -> Hop:
        payload = np.frombuffer(os.urandom(size), np.uint8)
        return lambda: ray.get(peer.take.remote(payload), timeout=WAIT_S)

    return prepare


def raylet(stack: contextlib.ExitStack, address: str, *options: str) -> None:
    """A node of Ray at `address`, all of whose processes end with the stack."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--node-ip-address={address}", "--num-cpus=1"]
    process = subprocess.Popen(
        [*command, f"--object-store-memory={256 << 20}", "--block", *options],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        own = psutil.Process(process.pid)
        everything = [*own.children(recursive=True), own]
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()

    stack.callback(end)


def wait_for(address: str) -> None:
    """Until something listens there. Raises TimeoutError."""
    host, port = address.split(":")
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens at {address}")


def measure(systems: dict[str, System], sizes: dict[str, int], seconds: float, rounds: int) -> list[Row]:
    """Every system at every size, in turn, `rounds` times, `seconds` in all."""
    hops = {(name, size): system(sizes[size]) for size in sizes for name, system in systems.items()}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in hops}
    for hop in hops.values():
        for _ in range(3):
            hop()
    share = seconds / rounds / len(hops)
    for _ in range(rounds):
        for key, hop in hops.items():
            end = time.perf_counter() + share
            while (begin := time.perf_counter()) < end:
                hop()
                times[key].append((time.perf_counter() - begin) * 1e6)
    return [Row(*key, len(t), statistics.median(t), percentile(t, 0.99)) for key, t in times.items()]


def percentile(values: list[float], share: float) -> float:
    """The value below which `share` of all lie."""
    return sorted(values)[min(int(len(values) * share), len(values) - 1)]


def table(rows: list[Row]) -> str:
    """p50 / p99 in microseconds, a row for each system and a column for each size, and how ours compares."""
    sizes = list(dict.fromkeys(row.size for row in rows))
    systems = list(dict.fromkeys(row.system for row in rows))
    cells = {(row.system, row.size): row for row in rows}
    lines = ["| us, p50 / p99 | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for system in systems:
        texts = [f"{cells[system, size].p50_us:.0f} / {cells[system, size].p99_us:.0f}" for size in sizes]
        lines.append(f"| {system} | " + " | ".join(texts) + " |")
    for other in ("bare gRPC", "Ray actor"):
        if other in systems:
            ratios = [cells["handoff", size].p50_us / cells[other, size].p50_us for size in sizes]
            lines.append(f"| handoff / {other} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=12.0, help="of measuring, all systems and sizes together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk-bytes", type=int, default=HandoffSettings().chunk_bytes)
    parser.add_argument("--no-ray", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        settings = HandoffSettings(chunk_bytes=arguments.chunk_bytes)
        # First: it forks, which gRPC's threads do not bear.
        ray_systems = {} if arguments.no_ray else {"Ray actor": ray_actor(stack)}
        systems = {
            "raw TCP": tcp(stack),
            "bare gRPC": bare_grpc(stack),
            "handoff": acknowledged(stack, settings),
            "handoff, token": with_token(stack, settings),
            **ray_systems,
        }
        rows = measure(systems, SIZES, arguments.seconds, arguments.rounds)
    load = os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load average {load:.1f}, chunks of {arguments.chunk_bytes} bytes\n\n{table(rows)}")
    if arguments.json is not None:
        facts = {"cores": os.cpu_count(), "load": load, "chunk_bytes": arguments.chunk_bytes}
        arguments.json.write_text(json.dumps({**facts, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
