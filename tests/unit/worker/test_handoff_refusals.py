"""Which peers and frames a link refuses, and that both ends learn why: real gRPC, and a peer that speaks by hand."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import grpc
import pytest
from handoff_ends import EPOCH, FAST, TOKEN, WAIT_S, Ends, hidden, is_equal

from pomarium.proto import handoff_pb2 as pb
from pomarium.proto import handoff_pb2_grpc as pb_grpc
from pomarium.worker.handoff.credentials import bearer
from pomarium.worker.handoff.errors import (
    EpochError,
    GapError,
    HandoffError,
    HandoffTimeoutError,
    MalformedFrameError,
    PeerLostError,
    PeerRefusedError,
    SessionError,
)
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.probe import probe
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.wire import encode


@pytest.fixture
def ends() -> Iterator[Ends]:
    with closing(Ends()) as made:
        yield made


class Hand:
    """A sender of ours to command, on protobuf's own encoder."""

    def __init__(self, address: str, hello: pb.Hello, token: str = TOKEN) -> None:
        self._frames: queue.SimpleQueue[pb.Frame | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        stub = pb_grpc.HandoffStub(self._channel)  # type: ignore[no-untyped-call]
        self.answers = stub.Link(iter(self._frames.get, None), metadata=bearer(token), timeout=WAIT_S)
        self.say(pb.FrameHead(hello=hello))

    def say(self, head: pb.FrameHead, payload: bytes = b"") -> None:
        self._frames.put(pb.Frame.FromString(encode(head, payload)))

    def chunk(self, seq: int, step: int, **changes: int) -> None:
        fields = {"seq": seq, "epoch": EPOCH, "step": step, "tensor_count": 1, "count": 1, "dtype": pb.INT32} | changes
        self.say(pb.FrameHead(chunk=pb.Chunk(tensor="a", shape=[1], **fields)), step.to_bytes(4, "little"))  # type: ignore[arg-type]

    def answer(self) -> pb.AnswerHead:
        answer: pb.Answer = next(self.answers)
        return answer.head

    def close(self) -> None:
        self._frames.put(None)
        self._channel.close()


HELLO = pb.Hello(epoch=EPOCH, rank=0, session=b"by hand", window_bytes=FAST.window_bytes)


@pytest.fixture
def hand(ends: Ends) -> Iterator[Hand]:
    made = Hand(ends.server.address, HELLO)
    assert made.answer().accepted == pb.Accepted(next_seq=0)
    yield made
    made.close()


def test_doubled_chunks_are_dropped(ends: Ends, hand: Hand) -> None:
    for seq in (0, 0, 1, 0, 1, 2):
        hand.chunk(seq, step=seq)
    assert [ends.inbox.receive(step, WAIT_S)["a"].tolist() for step in range(3)] == [[0], [1], [2]]
    assert [hand.answer().accepted.next_seq for _ in range(3)] == [1, 2, 3]
    with pytest.raises(HandoffTimeoutError):
        ends.inbox.receive(3, 0.05)


@pytest.mark.parametrize(
    ("reason", "fault"),
    [
        (GapError, lambda hand: hand.chunk(1, step=1)),
        (EpochError, lambda hand: hand.chunk(0, step=0, epoch=EPOCH + 1)),
        (MalformedFrameError, lambda hand: hand.say(pb.FrameHead(hello=HELLO))),
        (HandoffError, lambda hand: hand.say(pb.FrameHead(refusal=pb.Refusal(error="Unheard", message="of")))),
    ],
)
def test_a_fault_is_told_to_both_ends(
    ends: Ends, hand: Hand, reason: type[HandoffError], fault: Callable[[Hand], None]
) -> None:
    fault(hand)
    with pytest.raises(reason):
        ends.inbox.receive(0, WAIT_S)
    assert type(ends.at_receiver.result(WAIT_S)) is reason
    if reason is not HandoffError:
        assert hand.answer().refusal.error == reason.__name__
    assert next(hand.answers, None) is None, "the stream is ended"


def test_a_stage_of_another_plan_is_refused(ends: Ends) -> None:
    with pytest.raises(EpochError, match="stage 0 belongs to plan 4, this one to plan 3"):
        Outbox.connect(ends.server.address, 0, EPOCH + 1, TOKEN, settings=FAST)
    assert isinstance(ends.at_receiver.result(WAIT_S), EpochError)


@pytest.mark.parametrize(("epoch", "reason"), [(EPOCH - 1, EpochError), (EPOCH, SessionError)])
def test_a_ghost_cannot_end_a_link_that_works(ends: Ends, epoch: int, reason: type[HandoffError]) -> None:
    outbox = ends.outbox()
    with pytest.raises(reason):
        Outbox.connect(ends.server.address, 0, epoch, TOKEN, settings=FAST)
    outbox.send(0, hidden(0))
    assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))
    assert not ends.at_receiver.done()


def test_a_sender_that_was_started_anew_is_refused_at_once(ends: Ends) -> None:
    first = Hand(ends.server.address, HELLO)
    first.answer()
    first.close()
    time.sleep(0.1)
    with pytest.raises(SessionError, match="started anew"):
        ends.outbox()
    assert isinstance(ends.at_receiver.result(WAIT_S), SessionError)


@pytest.mark.parametrize("token", ["", "a toke", "A TOKEN"])
def test_another_token_is_refused(ends: Ends, token: str) -> None:
    start = time.monotonic()
    with pytest.raises(PeerRefusedError, match="UNAUTHENTICATED"):
        Outbox.connect(ends.server.address, 0, EPOCH, token, settings=FAST)
    with pytest.raises(PeerRefusedError, match="UNAUTHENTICATED"):
        probe(ends.server.address, token)
    assert time.monotonic() - start < 2
    assert not ends.at_receiver.done()


def test_a_sender_may_come_before_its_inbox(ends: Ends) -> None:
    later = threading.Timer(0.2, lambda: ends.server.inbox(7))
    later.start()
    Outbox.connect(ends.server.address, 7, EPOCH, TOKEN, settings=FAST).close()
    with pytest.raises(PeerLostError, match="this worker expects nothing from stage 8"):
        Outbox.connect(ends.server.address, 8, EPOCH, TOKEN, settings=FAST, timeout_s=0.4)
    with pytest.raises(ValueError, match="already"):
        ends.server.inbox(7)


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    with pytest.raises(PeerLostError, match=r"was not reached in 0\.3 s: UNAVAILABLE"):
        Outbox.connect(f"127.0.0.1:{port}", 0, EPOCH, TOKEN, settings=FAST, timeout_s=0.3)
    assert time.monotonic() - start < 2


def test_an_address_that_is_taken_is_named(ends: Ends) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {ends.server.address}"):
        HandoffServer(ends.server.address, EPOCH, TOKEN)
