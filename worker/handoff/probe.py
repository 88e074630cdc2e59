"""Round trip and bandwidth between two workers, over the service and the port that the tensors use.

probe --small frames, one at a time--> answers: median round trip
      --large frames, several in flight--> answers: bytes per second
"""

import queue
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import grpc

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker import local_network
from pomarium.worker.address import host_of
from pomarium.worker.handoff.credentials import Tls, bearer, check_plaintext, open_channel
from pomarium.worker.handoff.errors import HandoffError, PeerLostError, PeerRefusedError, as_refusal, from_refusal
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.wire import decode_answer, decode_frame, encode

PROBE = "Probe"
PATH = "/pomarium.handoff.v1.Handoff/Probe"
ROUND_TRIPS = 50
IN_FLIGHT = 8
"""Large frames under way at a time: 8 MiB, more than a 10 Gb/s link with 5 ms of delay holds."""
ROUND_TRIP_SHARE = 0.4
"""Of the time allowed."""
CONNECT_S = 5.0
ASK_S = 1.0
"""For the system's word on a connection that gRPC could not open."""


@dataclass(frozen=True)
class LinkFacts:
    """What a link is good for.

    Attributes:
        rtt_s: median round trip of a small message, in seconds.
        bandwidth_bytes_per_s: payload from here to there.
    """

    rtt_s: float
    bandwidth_bytes_per_s: float


def probe(
    address: str,
    token: str,
    tls: Tls | None = None,
    settings: HandoffSettings | None = None,
    seconds: float = 1.0,
) -> LinkFacts:
    """Measures the link to the HandoffServer at `address` for about `seconds`.

    Raises PlaintextRefusedError, PeerRefusedError, or PeerLostError if it takes more than `seconds` + 6 s.
    """
    settings = settings or HandoffSettings()
    check_plaintext(address, tls, settings)
    frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with open_channel(address, tls, settings.client_options()) as channel:
        call = channel.stream_stream(PATH, None, None)
        answers = call(iter(frames.get, None), metadata=bearer(token), timeout=seconds + CONNECT_S, wait_for_ready=True)
        try:
            rtt_s = _round_trip(frames, answers, seconds * ROUND_TRIP_SHARE)
            payload = memoryview(bytes(settings.chunk_bytes))
            rate = _bandwidth(frames, answers, payload, seconds * (1 - ROUND_TRIP_SHARE), rtt_s)
        except grpc.RpcError as error:
            raise _failure(address, error) from None
        finally:
            frames.put(None)
    return LinkFacts(rtt_s, rate)


def answer_probe(requests: Iterator[bytes]) -> Iterator[bytes]:
    """The server's side: checks each frame, as a link would, and answers with the number of bytes."""
    try:
        for message in requests:
            _, payload = decode_frame(message)
            yield encode(pb.AnswerHead(accepted=pb.Accepted(consumed=len(payload))))
    except HandoffError as error:
        yield encode(pb.AnswerHead(refusal=as_refusal(error)))


def _round_trip(frames: "queue.SimpleQueue[bytes | None]", answers: Iterator[bytes], seconds: float) -> float:
    hello = encode(pb.FrameHead(hello=pb.Hello()))
    frames.put(hello)
    _await(answers)  # includes connecting
    end = time.perf_counter() + seconds
    times: list[float] = []
    while len(times) < ROUND_TRIPS and (not times or time.perf_counter() < end):
        start = time.perf_counter()
        frames.put(hello)
        _await(answers)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _bandwidth(
    frames: "queue.SimpleQueue[bytes | None]",
    answers: Iterator[bytes],
    payload: memoryview,
    seconds: float,
    rtt_s: float,
) -> float:
    frame = encode(pb.FrameHead(chunk=pb.Chunk()), payload)
    frames.put(frame)
    _await(answers)  # opens TCP's window
    start = now = time.perf_counter()
    sent = received = 0
    while received < sent or now < start + seconds:
        while sent < received + IN_FLIGHT and now < start + seconds:
            frames.put(frame)
            sent += 1
        _await(answers)
        received += 1
        now = time.perf_counter()
    return received * len(payload) / max(now - start - rtt_s / 2, 1e-9)


def _await(answers: Iterator[bytes]) -> None:
    message = next(answers, None)
    if message is None:
        raise PeerLostError("the peer ended the probe")
    answer = decode_answer(message)
    if answer.WhichOneof("kind") == "refusal":
        raise from_refusal(answer.refusal)


def _failure(address: str, error: grpc.RpcError) -> HandoffError:
    text = f"{error.code().name}: {error.details()}"
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        # gRPC has tried again and again, and does not tell why that failed.
        fault = local_network.fault(host_of(address), int(address.rpartition(":")[2]), ASK_S)
        text = text if fault is None else local_network.reason(fault)
    text = local_network.explained(text, address)
    if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED):
        return PeerRefusedError(f"{address} refused to be probed: {text}")
    return PeerLostError(f"{address} did not answer the probe: {text}")
