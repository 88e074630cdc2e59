"""Links over real gRPC on loopback: steps, credit, resumption, refusals, TLS, the probe."""

import datetime
import ipaddress
import itertools
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import mlx.core as mx
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from link_proxy import LinkProxy
from recording_proxy import proxied

from pomarium.proto import handoff_pb2 as pb
from pomarium.proto import handoff_pb2_grpc as pb_grpc
from pomarium.worker.handoff.credentials import RACK_NAME, Tls, bearer
from pomarium.worker.handoff.errors import (
    ChecksumError,
    CredentialsError,
    EpochError,
    GapError,
    HandoffError,
    HandoffTimeoutError,
    LinkClosedError,
    MalformedFrameError,
    PeerLostError,
    PeerRefusedError,
    PlaintextRefusedError,
    SessionError,
    StepError,
)
from pomarium.worker.handoff.inbox import Inbox
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.probe import probe
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.wire import encode

EPOCH, TOKEN, WAIT_S = 3, "a token", 10.0
FAST = HandoffSettings(chunk_bytes=64 << 10, ping_interval_s=1.0, ping_timeout_s=1.0, attempt_s=0.5, away_s=0.6)


@dataclass
class Ends:
    """A receiving server, and what both ends were told."""

    settings: HandoffSettings = FAST
    tls: Tls | None = None
    at_receiver: "Future[HandoffError]" = field(default_factory=Future)
    at_sender: "Future[HandoffError]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self._opened: list[Callable[[], None]] = []
        self.server = HandoffServer(
            "127.0.0.1:0", EPOCH, TOKEN, self.tls, self.settings, lambda _, error: self.at_receiver.set_result(error)
        )
        self.inbox: Inbox = self.server.inbox(0)

    def outbox(self, address: str | None = None, timeout_s: float = WAIT_S) -> Outbox:
        made = Outbox.connect(
            address or self.server.address,
            0,
            EPOCH,
            TOKEN,
            self.tls,
            self.settings,
            self.at_sender.set_result,
            timeout_s,
        )
        self._opened.append(lambda: made.close(0.0))
        return made

    def proxy(self) -> LinkProxy:
        made = LinkProxy(self.server.address)
        self._opened.append(made.close)
        return made

    def close(self) -> None:
        for close in reversed(self._opened):
            close()
        self.server.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def hidden(step: int, nbytes: int = 64) -> dict[str, mx.array]:
    """bf16 rows that differ from step to step."""
    words = (np.arange(nbytes // 2, dtype=np.uint32) * 2654435761 + step).astype(np.uint16)
    return {"hidden": mx.array(words).view(mx.bfloat16), "positions": mx.array([step], mx.int32)}


def is_equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    assert list(one) == list(other)
    return all(
        a.dtype == b.dtype and bytes(memoryview(a)) == bytes(memoryview(b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )


def test_no_proxy_of_the_environment_comes_between(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch) as proxy:
        ends.outbox().send(0, hidden(0))
        assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))
    assert proxy.asked == []


def test_steps_come_out_as_they_went_in(ends: Ends) -> None:
    outbox = ends.outbox()
    for step, nbytes in enumerate((2, 1 << 10, 64 << 10, (64 << 10) + 2, 1 << 20, 32 << 20)):
        outbox.send(step, hidden(step, nbytes))
        assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, nbytes))


def test_a_ring_of_two_stages(ends: Ends) -> None:
    """Hidden states go on, token ids come back, for each step; each stage loop on a thread of its own."""
    back = HandoffServer("127.0.0.1:0", EPOCH, TOKEN)
    tokens = back.inbox(1)

    def last_stage() -> int:
        outbox = Outbox.connect(back.address, 1, EPOCH, TOKEN)
        for step in range(100):
            tensors = ends.inbox.receive(step, WAIT_S)
            out = {"tokens": tensors["positions"] * 2}
            outbox.send(step, out)
        outbox.close()
        return 100

    done: Future[int] = Future()
    threading.Thread(target=lambda: done.set_result(last_stage()), daemon=True).start()
    outbox = ends.outbox()
    for step in range(100):
        outbox.send(step, hidden(step, 1 << 12))
        assert tokens.receive(step, WAIT_S)["tokens"].tolist() == [2 * step]
    assert done.result(WAIT_S) == 100
    with pytest.raises(LinkClosedError, match="stage 1 closed the link"):
        tokens.receive(100, WAIT_S)
    back.close()


def test_sending_does_not_wait_for_the_link(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    proxy.bytes_per_s = 4e6
    start = time.monotonic()
    for step in range(4):
        outbox.send(step, hidden(step, 500_000))
    sent_s = time.monotonic() - start
    assert [is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 500_000)) for step in range(4)] == [True] * 4
    assert time.monotonic() - start > max(0.4, 2 * sent_s)


def test_a_slow_receiver_slows_the_sender() -> None:
    ends = Ends(replace(FAST, window_bytes=1 << 20))
    try:
        outbox = ends.outbox()
        sent = 0
        with pytest.raises(HandoffTimeoutError, match=r"was not sent to .* in 0\.3 s: \d+ bytes wait"):  # noqa: PT012
            for sent in range(1000):
                outbox.send(sent, hidden(sent, 300_000), timeout_s=0.3)
        assert sent == 4, "a window and one step at most"
        waiting: Future[float] = Future()

        def send_on() -> None:
            outbox.send(sent, hidden(sent, 300_000), WAIT_S)
            waiting.set_result(time.monotonic())

        threading.Thread(target=send_on, daemon=True).start()
        time.sleep(0.1)
        assert not waiting.done()
        for step in range(sent + 1):
            assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 300_000))
        waiting.result(WAIT_S)
        for step in range(sent + 1, 60):  # credit goes on coming back
            outbox.send(step, hidden(step, 300_000), WAIT_S)
            ends.inbox.receive(step, WAIT_S)
    finally:
        ends.close()


def test_receive_has_a_deadline_and_the_link_goes_on(ends: Ends) -> None:
    outbox = ends.outbox()
    with pytest.raises(HandoffTimeoutError, match=r"step 0 did not come from stage 0 in 0\.05 s"):
        ends.inbox.receive(0, 0.05)
    outbox.send(0, hidden(0))
    assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))


def test_another_step_than_asked_for_fails_both_ends(ends: Ends) -> None:
    ends.outbox().send(4, hidden(4))
    with pytest.raises(StepError, match="step 4 came from stage 0 where step 3 was due"):
        ends.inbox.receive(3, WAIT_S)
    assert isinstance(ends.at_sender.result(WAIT_S), StepError)
    assert isinstance(ends.at_receiver.result(WAIT_S), StepError)


@pytest.mark.parametrize("seed", [1, 2])
def test_cut_connections_lose_and_double_nothing(ends: Ends, seed: int) -> None:
    random = np.random.default_rng(seed)
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    for first in range(0, 30, 3):  # three steps under way each time
        proxy.cut_after(int(random.integers(1, 400_000)))
        for step in range(first, first + 3):
            outbox.send(step, hidden(step, 150_000))
        for step in range(first, first + 3):
            assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 150_000))
    assert proxy.connections > 10
    assert not ends.at_sender.done()
    assert not ends.at_receiver.done()


def test_an_outage_shorter_than_the_deadline_is_bridged(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    proxy.refusing = True
    proxy.cut()
    outbox.send(0, hidden(0))
    time.sleep(0.3)
    proxy.refusing = False
    assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))


@pytest.mark.parametrize("how", ["refused", "held"])
def test_a_longer_one_fails_everything_that_waits(how: str) -> None:
    """refused: connections are closed at once. held: nothing comes through, as when a cable is pulled out."""
    ends = Ends(replace(FAST, window_bytes=1))
    try:
        proxy = ends.proxy()
        outbox = ends.outbox(proxy.address)
        waiting: dict[str, Future[float]] = {"send": Future(), "receive": Future()}

        def wait(name: str, call: Callable[[], object]) -> None:
            try:
                call()
            except PeerLostError:
                waiting[name].set_result(time.monotonic())

        start = time.monotonic()
        if how == "held":
            proxy.hold()
        else:
            proxy.refusing = True
            proxy.cut()
        outbox.send(0, hidden(0))  # queued; the next has to wait for credit
        for name, call in (
            ("send", lambda: outbox.send(1, hidden(1), 60)),
            ("receive", lambda: ends.inbox.receive(0, 60)),
        ):
            threading.Thread(target=wait, args=(name, call), daemon=True).start()
        for future in waiting.values():
            assert future.result(WAIT_S) - start < 5.0
        for told in (ends.at_sender, ends.at_receiver):
            assert "away for more than 0.6 s" in str(told.result(1))
    finally:
        ends.close()


def test_a_path_that_always_breaks_again_is_given_up(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)

    def breaks(data: bytes) -> bytes:
        if len(data) > 4000:  # Hello passes, a chunk never does
            proxy.cut()
        return data

    proxy.alter = breaks
    outbox.send(0, hidden(0, 60_000))
    assert isinstance(ends.at_sender.result(WAIT_S), PeerLostError)
    assert isinstance(ends.at_receiver.result(WAIT_S), PeerLostError)


def test_an_altered_payload_is_refused_at_both_ends(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    proxy.alter = lambda data: data.replace(b"\xab" * 64, b"\xab" * 63 + b"\xaa", 1)
    outbox.send(0, {"a": mx.full((1 << 14,), -1414812757, mx.int32)})  # 0xABABABAB
    with pytest.raises(ChecksumError, match="arrived altered"):
        ends.inbox.receive(0, WAIT_S)
    assert isinstance(ends.at_sender.result(WAIT_S), ChecksumError)
    with pytest.raises(ChecksumError):
        outbox.send(1, hidden(1))


def test_noise_on_the_path_gives_the_sent_steps_or_a_reason(ends: Ends) -> None:
    """Any byte of HTTP/2 may change: the connection is resumed, or the link refused; never other values."""
    random = np.random.default_rng(0)
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)

    def noise(data: bytes) -> bytes:
        if random.random() > 0.1:
            return data
        place = int(random.integers(len(data)))
        return data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :]

    proxy.alter = noise
    try:
        for step in range(40):
            outbox.send(step, hidden(step, 40_000), WAIT_S)
            assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 40_000))
    except HandoffError as error:
        assert not isinstance(error, HandoffTimeoutError)  # noqa: PT017


# --- a peer that speaks by hand, through the generated stub ---------------------------------------------------------


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


# --- ends of links --------------------------------------------------------------------------------------------------


def test_what_was_sent_before_the_end_still_arrives(ends: Ends) -> None:
    outbox = ends.outbox()
    for step in range(3):
        outbox.send(step, hidden(step, 200_000))
    assert outbox.flush(WAIT_S)
    outbox.send(3, hidden(3))
    outbox.close()
    for step in range(3):
        assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 200_000))
    assert is_equal(ends.inbox.receive(3, WAIT_S), hidden(3))
    for _ in range(2):
        with pytest.raises(LinkClosedError, match="stage 0 closed the link"):
            ends.inbox.receive(4, WAIT_S)
    with pytest.raises(LinkClosedError):
        outbox.send(4, hidden(4))
    assert not ends.at_receiver.done()
    assert not ends.at_sender.done()


def test_a_receiver_that_closes_tells_its_sender(ends: Ends) -> None:
    outbox = ends.outbox()
    ends.server.close()
    with pytest.raises(LinkClosedError):  # noqa: PT012 - from the first after it was told
        for step in itertools.count():
            outbox.send(step, hidden(step))
            time.sleep(0.01)
    assert not ends.at_sender.done(), "an orderly end is no failure"


@pytest.mark.parametrize("finder", ["sender", "receiver"])
def test_the_failure_of_a_stage_reaches_its_neighbour(ends: Ends, finder: str) -> None:
    outbox = ends.outbox()
    error = HandoffError("stage failed: ValueError: broken")
    start = time.monotonic()
    (outbox if finder == "sender" else ends.server).fail(error)
    for told in (ends.at_sender, ends.at_receiver):
        assert str(told.result(WAIT_S)) == str(error)
    assert time.monotonic() - start < 1
    with pytest.raises(HandoffError, match="broken"):
        outbox.send(0, hidden(0))
    with pytest.raises(HandoffError, match="broken"):
        ends.inbox.receive(0, WAIT_S)


def test_a_process_with_links_can_exit(tmp_path: Path) -> None:
    script = tmp_path / "link.py"
    script.write_text(
        "import mlx.core as mx\n"
        "from pomarium.worker.handoff.outbox import Outbox\n"
        "from pomarium.worker.handoff.server import HandoffServer\n"
        "server = HandoffServer('127.0.0.1:0', 1, 't')\n"
        "inbox = server.inbox(0)\n"
        "outbox = Outbox.connect(server.address, 0, 1, 't')\n"
        "outbox.send(0, {'a': mx.array([7])})\n"
        "assert inbox.receive(0, 10)['a'].tolist() == [7]\n"
        "outbox.close()\n"
        "server.close()\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=30)


# --- TLS and plain text ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def identity(self) -> Tls:
        key = ec.generate_private_key(ec.SECP256R1())
        return Tls(
            pem(certificate("mac", key, self.certificate.subject, self.key)),
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            ),
            pem(self.certificate),
        )


def pem(made: x509.Certificate) -> bytes:
    return made.public_bytes(serialization.Encoding.PEM)


def certificate(
    name: str, key: ec.EllipticCurvePrivateKey, issuer: x509.Name | None, issuer_key: ec.EllipticCurvePrivateKey
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(RACK_NAME), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder(issuer or subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )


def authority() -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(certificate("rack", key, None, key), key)


def test_mutual_tls() -> None:
    rack = authority()
    ends = Ends(tls=rack.identity())
    try:
        outbox = Outbox.connect(ends.server.address, 0, EPOCH, TOKEN, rack.identity(), FAST)
        outbox.send(0, hidden(0, 200_000))
        assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0, 200_000))
        assert probe(ends.server.address, TOKEN, rack.identity(), FAST, 0.2).rtt_s > 0
        for stranger in (None, authority().identity()):  # the token alone is not enough
            ends.server.inbox(1 if stranger is None else 2)
            with pytest.raises(PeerLostError):
                Outbox.connect(
                    ends.server.address, 1 if stranger is None else 2, EPOCH, TOKEN, stranger, FAST, timeout_s=0.4
                )
        outbox.close()
    finally:
        ends.close()


def test_a_certificate_with_another_key_is_refused() -> None:
    one, other = authority().identity(), authority().identity()
    with pytest.raises(CredentialsError, match="cannot be used"):
        HandoffServer("127.0.0.1:0", EPOCH, TOKEN, replace(one, key=other.key))


def test_plain_text_beyond_loopback_is_refused() -> None:
    with pytest.raises(PlaintextRefusedError, match="allow_plaintext=True in HandoffSettings"):
        HandoffServer("0.0.0.0:0", EPOCH, TOKEN)
    with pytest.raises(PlaintextRefusedError):
        Outbox.connect("192.0.2.1:7", 0, EPOCH, TOKEN)
    with pytest.raises(PlaintextRefusedError):
        probe("192.0.2.1:7", TOKEN)
    HandoffServer("0.0.0.0:0", EPOCH, TOKEN, settings=HandoffSettings(allow_plaintext=True)).close()


def test_an_address_that_is_taken_is_named(ends: Ends) -> None:
    with pytest.raises(OSError, match=f"cannot listen on {ends.server.address}"):
        HandoffServer(ends.server.address, EPOCH, TOKEN)


# --- probe ----------------------------------------------------------------------------------------------------------


def test_the_probe_sees_delay_and_rate(ends: Ends) -> None:
    near = probe(ends.server.address, TOKEN, seconds=0.3)
    proxy = ends.proxy()
    proxy.delay_s, proxy.bytes_per_s = 0.02, 8e6
    far = probe(proxy.address, TOKEN, settings=FAST, seconds=0.6)
    assert near.rtt_s < 0.02 < 0.04 <= far.rtt_s < 1.0
    assert near.bandwidth_bytes_per_s > 2 * far.bandwidth_bytes_per_s > 0


def test_the_probe_is_bounded(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pomarium.worker.handoff.probe.CONNECT_S", 0.3)
    proxy = ends.proxy()
    proxy.hold()
    start = time.monotonic()
    with pytest.raises(PeerLostError, match="did not answer the probe"):
        probe(proxy.address, TOKEN, seconds=0.1)
    assert time.monotonic() - start < 3
