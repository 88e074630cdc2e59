"""What it takes to pass a step's two calls to a worker and its answer back, and nothing else, by the way they pass.

    this process --two calls of 600 and 60 bytes--> a worker's process --an answer of 600--> this process, which waits
    for each way in turns --> us of wall time, and of processor time at either end

The ways:
    a stream of gRPC's   a thread at each end takes messages out of the stream, another puts them in (its Python's)
    ZeroMQ               as vLLM's MessageQueue over TCP, whose worker answers both calls
    wire, two readers    cluster/executor/wire.py, as RackExecutor has it: a thread at each end reads
    wire, one reader     the engine's thread reads its answer itself
    wire, no reader      so does the worker's, its calls

    python benchmarks/hops.py [--steps 2000] [--rounds 5]
"""

import argparse
import contextlib
import multiprocessing
import os
import queue
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from measure import Load

GRPC, ZMQ, BOTH, ONE, NONE = "stream of gRPC's", "ZeroMQ", "wire, two readers", "wire, one reader", "wire, no reader"
WAYS = (GRPC, ZMQ, BOTH, ONE, NONE)
POSTED, WANTED, LAST, ANSWER = b"p" * 600, b"w" * 60, b"l", b"a" * 600
KEY = bytes(32)
PATH = "/hops/Stream"
HOST = "127.0.0.1"


@dataclass(frozen=True)
class End:
    """One end of a way. `receive` waits for the next message."""

    send: Callable[[bytes], Any]
    receive: Callable[[], bytes]
    close: Callable[[], Any]


def main() -> None:
    """See the module."""
    options = _options()
    found: dict[str, list[tuple[float, float, float]]] = {way: [] for way in WAYS}
    load = Load()
    for turn in range(options.rounds + 1):
        for way in WAYS:
            times = measure(way, options.steps)
            if turn:  # the first round warms up
                found[way].append(times)
    from report import table

    rows = []
    for way, times in found.items():
        columns = [sorted(column) for column in zip(*times, strict=True)]
        rows.append([way, *(f"{statistics.median(c):.0f} ({c[0]:.0f} to {c[-1]:.0f})" for c in columns)])
    print(f"{os.cpu_count()} cores, of which others used {load.others():.2f}; {options.steps} steps; median of "
          f"{options.rounds} rounds in turns (lowest to highest)\n")  # fmt: skip
    print(table(["us per step", "wall time", "processor, engine's end", "processor, worker's end"], rows))


def measure(way: str, steps: int) -> tuple[float, float, float]:
    """us per step: wall time, processor time here, processor time in the worker's process."""
    near, far = multiprocessing.Pipe()
    worker = multiprocessing.get_context("spawn").Process(target=work, args=(way, far))
    worker.start()
    end = engine_end(way, near.recv())
    wanted = 2 if way == ZMQ else 1
    near.recv()
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        end.send(POSTED)
        end.send(WANTED)
        for _ in range(wanted):
            end.receive()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    end.send(LAST)
    theirs = near.recv()
    end.close()
    near.send(None)
    worker.join()
    return 1e6 * wall / steps, 1e6 * processor / steps, 1e6 * theirs / steps


def work(way: str, pipe: Any) -> None:
    """The worker's process: tells where it listens, that it is there, and what processor time it took."""
    end = worker_end(way, pipe.send)
    pipe.send(None)
    answered = (POSTED, WANTED) if way == ZMQ else (WANTED,)
    began = None
    while (message := end.receive()) != LAST:
        began = time.process_time() if began is None else began
        if message in answered:
            end.send(ANSWER)
    pipe.send(time.process_time() - (began or 0.0))
    pipe.recv()
    end.close()


def engine_end(way: str, address: str) -> End:
    """Connected to the worker's `address`."""
    if way == GRPC:
        import grpc

        channel = grpc.insecure_channel(address)
        out: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        stream = channel.stream_stream(PATH)(iter(out.get, None))
        return End(out.put, _resolved(lambda: next(stream)), channel.close)
    if way == ZMQ:
        import zmq

        context = zmq.Context()
        sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for one, port in zip((sender, receiver), address.split(), strict=True):
            one.connect(port)
        return _zmq_end(context, sender, receiver)
    from pomarium.cluster.executor.wire import Wire
    from pomarium.cluster.http.sealing import End as Side

    host, port = address.split(":")
    wire = Wire(_no_delay(socket.create_connection((host, int(port)))), KEY, Side.DIALLED)
    return End(wire.send, _resolved(wire.receive) if way == BOTH else wire.receive, wire.cut)


def worker_end(way: str, tell: Callable[[str], None]) -> End:
    """Listens, and `tell`s where."""
    if way == GRPC:
        return _grpc_worker(tell)
    if way == ZMQ:
        import zmq

        context = zmq.Context()
        receiver, sender = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        for one in (receiver, sender):
            one.bind(f"tcp://{HOST}:0")
        tell(" ".join(one.getsockopt(zmq.LAST_ENDPOINT).decode() for one in (receiver, sender)))
        return _zmq_end(context, sender, receiver)
    from pomarium.cluster.executor.wire import Wire
    from pomarium.cluster.http.sealing import End as Side

    with socket.create_server((HOST, 0)) as listener:
        tell(f"{HOST}:{listener.getsockname()[1]}")
        wire = Wire(_no_delay(listener.accept()[0]), KEY, Side.LISTENED)
    if way == NONE:
        return End(wire.send, wire.receive, wire.cut)
    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_queue, args=(wire.receive, calls), daemon=True).start()
    return End(wire.send, calls.get, wire.cut)


def _grpc_worker(tell: Callable[[str], None]) -> End:
    import grpc

    calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def stream(requests: Iterator[bytes], context: object) -> Iterator[bytes]:
        threading.Thread(target=_queue, args=(lambda: next(requests), calls), daemon=True).start()
        while (answer := out.get()) is not None:
            yield answer

    handler = grpc.method_handlers_generic_handler("hops", {"Stream": grpc.stream_stream_rpc_method_handler(stream)})
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    tell(f"{HOST}:{port}")
    return End(out.put, calls.get, lambda: out.put(None))


def _zmq_end(context: Any, sender: Any, receiver: Any) -> End:
    def receive() -> bytes:
        receiver.poll()
        received: bytes = receiver.recv_multipart(copy=False)[0].bytes
        return received

    return End(lambda message: sender.send_multipart([message], copy=False), receive, lambda: context.destroy(0))


def _queue(receive: Callable[[], bytes], messages: "queue.SimpleQueue[bytes]") -> None:
    """The thread that reads at a worker."""
    with contextlib.suppress(Exception):  # the end, of whatever kind
        while True:
            messages.put(receive())


def _resolved(receive: Callable[[], bytes]) -> Callable[[], bytes]:
    """`receive` on a thread of its own, which resolves a Future for each answer, as a link does."""
    waiting: queue.SimpleQueue[Future[bytes]] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(Exception):  # the end, of whatever kind
            while True:
                answer = receive()
                waiting.get().set_result(answer)

    def wait() -> bytes:
        future: Future[bytes] = Future()
        waiting.put(future)
        return future.result()

    threading.Thread(target=read, daemon=True).start()
    return wait


def _no_delay(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
