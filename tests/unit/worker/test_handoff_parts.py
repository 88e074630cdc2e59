"""The parts of a link that need no socket: encoding, tensors, window, reassembly, patience."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.credentials import CredentialsError, Tls, check_plaintext, is_bearer
from pomarium.worker.handoff.errors import (
    ChecksumError,
    CreditError,
    EpochError,
    GapError,
    HandoffError,
    MalformedFrameError,
    PlaintextRefusedError,
    SessionError,
    StepError,
    TensorError,
    as_refusal,
    from_refusal,
)
from pomarium.worker.handoff.patience import Patience
from pomarium.worker.handoff.reassembly import Reassembler, Step
from pomarium.worker.handoff.settings import MAX_CHUNK_BYTES, HandoffSettings
from pomarium.worker.handoff.tensors import Expected, Tensor, pack, unpack
from pomarium.worker.handoff.window import Piece, SendWindow
from pomarium.worker.handoff.wire import decode_answer, decode_frame, encode

EPOCH = 5
SMALL = HandoffSettings(chunk_bytes=8, window_bytes=2048, max_step_bytes=4096)
WIDE = dataclasses.replace(SMALL, window_bytes=1 << 30)
HELLO = pb.Hello(epoch=EPOCH, rank=1, session=b"session", window_bytes=SMALL.window_bytes)


def words(name: str, values: Sequence[int]) -> Tensor:
    data = memoryview(np.asarray(values, np.int32)).cast("B") if values else memoryview(b"")
    return Tensor(name, pb.INT32, (len(values),), data)


def pieces_of(steps: Sequence[Sequence[Sequence[int]]]) -> list[Piece]:
    window = SendWindow(EPOCH, WIDE)
    window.resume(pb.Accepted())
    for number, tensors in enumerate(steps):
        window.offer(number, [words(f"t{i}", values) for i, values in enumerate(tensors)])
    return list(iter(window.next_piece, None))


def joined(limits: HandoffSettings = WIDE, expects: dict[str, Expected] | None = None) -> Reassembler:
    made = Reassembler(EPOCH, limits, expects)
    made.begin(pb.Hello(epoch=EPOCH, rank=1, session=b"session", window_bytes=limits.window_bytes))
    return made


def values_of(step: Step) -> list[list[int]]:
    return [np.frombuffer(tensor.data, np.int32).tolist() for tensor in step.tensors]


# --- wire -----------------------------------------------------------------------------------------------------------

CHUNKS = st.builds(
    pb.Chunk,
    seq=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**64 - 1),
    step=st.integers(0, 2**64 - 1),
    tensor=st.text(max_size=200),
    dtype=st.sampled_from(pb.DType.values()),
    shape=st.lists(st.integers(0, 2**64 - 1), max_size=8),
    index=st.integers(0, 2**32 - 1),
)


@given(CHUNKS, st.binary(max_size=300))
def test_a_frame_is_what_protobuf_says_it_is(chunk: pb.Chunk, payload: bytes) -> None:
    message = encode(pb.FrameHead(chunk=chunk), payload)
    read = pb.Frame.FromString(message)
    assert (read.head.chunk, read.payload) == (chunk, payload)
    assert read.SerializeToString(deterministic=True) == message
    head, data = decode_frame(message)
    assert (head.chunk, bytes(data)) == (chunk, payload)


@given(CHUNKS, st.binary(max_size=50), st.data())
def test_an_altered_frame_is_refused(chunk: pb.Chunk, payload: bytes, data: st.DataObject) -> None:
    message = bytearray(encode(pb.FrameHead(chunk=chunk), payload))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(message) - 1))
        message[place] ^= data.draw(st.integers(1, 255))
    if bytes(message) != encode(pb.FrameHead(chunk=chunk), payload):
        with pytest.raises((ChecksumError, MalformedFrameError)):
            decode_frame(bytes(message))


@given(st.binary(max_size=60))
def test_anything_else_is_refused(message: bytes) -> None:
    with pytest.raises((ChecksumError, MalformedFrameError)):
        decode_frame(message)


@given(CHUNKS, st.binary(min_size=1, max_size=50), st.data())
def test_a_torn_frame_is_refused(chunk: pb.Chunk, payload: bytes, data: st.DataObject) -> None:
    message = encode(pb.FrameHead(chunk=chunk), payload)
    with pytest.raises((ChecksumError, MalformedFrameError)):
        decode_frame(message[: data.draw(st.integers(0, len(message) - 1))])


def test_the_checksum_is_crc32c() -> None:
    frame = pb.Frame.FromString(encode(pb.FrameHead(), b"123456789"))
    assert frame.crc32c == 0xE3069283  # the check value of CRC-32C (RFC 3720, Castagnoli)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_answers_pass(next_seq: int, consumed: int) -> None:
    accepted = pb.Accepted(next_seq=next_seq, consumed=consumed)
    assert decode_answer(encode(pb.AnswerHead(accepted=accepted))).accepted == accepted


def test_an_answer_has_no_payload_and_a_known_kind() -> None:
    with pytest.raises(MalformedFrameError, match="payload"):
        decode_answer(encode(pb.AnswerHead(goodbye=pb.Goodbye()), b"x"))
    with pytest.raises(MalformedFrameError, match="kind"):
        decode_answer(encode(pb.AnswerHead()))


@pytest.mark.parametrize("kind", HandoffError.__subclasses__())
def test_a_reason_is_the_same_at_both_ends(kind: type[HandoffError]) -> None:
    found = from_refusal(as_refusal(kind("a sentence")))
    local = {"PeerRefusedError", "HandoffTimeoutError"}  # found at the sender, about itself
    assert (type(found), str(found)) == (HandoffError if kind.__name__ in local else kind, "a sentence")


# --- tensors --------------------------------------------------------------------------------------------------------

DTYPES = (mx.bfloat16, mx.float16, mx.float32, mx.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 5)])
def test_arrays_keep_every_bit(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    array = (mx.random.normal(shape) * 1000).astype(dtype)
    (tensor,) = pack({"a": array})
    assert tensor.nbytes == len(tensor.data) == array.nbytes
    back = unpack(tensor)
    assert (back.dtype, back.shape) == (dtype, shape)
    assert mx.array_equal(back, array).item()


def test_bf16_is_never_widened() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)  # NaNs with payloads too
    (tensor,) = pack({"a": mx.array(every).view(mx.bfloat16)})
    assert np.array_equal(np.frombuffer(tensor.data, np.uint16), every)
    assert np.array_equal(np.array(unpack(tensor).view(mx.uint16)), every)


def test_a_strided_array_is_laid_out() -> None:
    array = mx.arange(24, dtype=mx.int32).reshape(4, 6)
    for view in (array.T, array[:, ::2], mx.broadcast_to(array[0], (3, 6))):
        assert mx.array_equal(unpack(pack({"a": view})[0]), view).item()


def test_a_view_lives_on_without_its_array() -> None:
    array = mx.arange(1000, dtype=mx.int32)
    (tensor,) = pack({"a": array})
    del array
    mx.eval([mx.zeros(1000) + i for i in range(20)])
    assert unpack(tensor).tolist() == list(range(1000))


@pytest.mark.parametrize("arrays", [{}, {"a": mx.zeros(2, mx.int8)}, {"a": mx.zeros([1] * 9)}])
def test_what_cannot_be_handed_on_is_refused(arrays: dict[str, mx.array]) -> None:
    with pytest.raises(TensorError, match="cannot be handed on"):
        pack(arrays)


# --- reassembly -----------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=7), min_size=1, max_size=3), min_size=1, max_size=5
)


@given(STEPS, st.data())
def test_any_disorder_gives_the_sent_steps_or_a_refusal(steps: list[list[list[int]]], data: st.DataObject) -> None:
    """Chunks dropped, doubled, moved: what comes out is a prefix of what was sent, and all of it if nothing raised."""
    pieces = pieces_of(steps)
    order = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=2 * len(pieces)) | st.just(range(len(pieces))))
    receiver, out, refused = joined(), [], False
    try:
        for index in order:
            step = receiver.add(pieces[index].chunk, pieces[index].payload)
            if step is not None:
                out.append(values_of(step))
    except GapError:
        refused = True
    assert out == steps[: len(out)]
    reached = 0
    for index in order:
        if index > reached:
            break
        reached = max(reached, index + 1)
    assert refused == any(index > max([-1, *order[:at]]) + 1 for at, index in enumerate(order))
    assert receiver.accepted().next_seq == reached


FIELDS = st.sampled_from(
    ["seq", "epoch", "step", "tensor_index", "tensor_count", "tensor", "dtype", "shape", "index", "count"]
)


@settings(max_examples=150)
@given(STEPS, FIELDS, st.data())
def test_a_head_that_lies_is_refused_or_changes_nothing_sent_before(
    steps: list[list[list[int]]], field: str, data: st.DataObject
) -> None:
    """A wrong field (behind a right checksum) never gives a step with other values than announced by its own chunks."""
    pieces = pieces_of(steps)
    place = data.draw(st.integers(0, len(pieces) - 1))
    lie = pb.Chunk()
    lie.CopyFrom(pieces[place].chunk)
    if field == "shape":
        lie.shape[:] = data.draw(st.lists(st.integers(0, 1 << 63), max_size=10))
    elif field == "tensor":
        lie.tensor = data.draw(st.text(max_size=4))
    elif field == "dtype":
        lie.dtype = data.draw(st.sampled_from([*pb.DType.values(), 99]))
    else:
        setattr(lie, field, data.draw(st.integers(0, 2**32 - 1) | st.integers(0, 4)))
    if lie == pieces[place].chunk:
        return
    pieces[place] = Piece(lie, pieces[place].payload)
    receiver, out = joined(), []
    try:
        for piece in pieces:
            step = receiver.add(piece.chunk, piece.payload)
            if step is not None:
                out.append(values_of(step))
    except HandoffError:
        if field == "tensor_count" and out and out[-1] != steps[len(out) - 1]:  # its first head ended the step early
            cut = out.pop()
            assert cut == steps[len(out)][: len(cut)]
        assert out == steps[: len(out)]
    else:  # only what the stage itself checks can differ: its own number, names, the shape of as many bytes
        assert field in ("step", "tensor", "shape", "dtype", "seq")
        assert out == steps or field == "seq"
        assert field != "seq" or len(out) < len(steps)  # taken for a duplicate, and nothing came after it


def test_each_refusal_has_its_reason() -> None:
    one = pieces_of([[[1, 2, 3, 4]], [[5]]])
    cases: list[tuple[type[HandoffError], int, dict[str, Any]]] = [
        (EpochError, 0, {"epoch": EPOCH + 1}),
        (GapError, 0, {"seq": 1}),
        (TensorError, 1, {"dtype": pb.FLOAT32}),
        (TensorError, 1, {"index": 0}),
        (TensorError, 1, {"tensor": "other"}),
        (TensorError, 0, {"dtype": 99}),
        (TensorError, 0, {"count": 0}),
        (TensorError, 0, {"count": 17}),
        (TensorError, 0, {"count": 1}),
        (StepError, 1, {"step": 7}),
        (StepError, 1, {"tensor_count": 2}),
        (StepError, 2, {"step": 0}),
        (MalformedFrameError, 0, {"tensor_count": 0}),
        (MalformedFrameError, 0, {"tensor_count": 1 << 20}),
    ]
    for reason, place, changes in cases:
        receiver = joined()
        for piece in one[:place]:
            receiver.add(piece.chunk, piece.payload)
        lie = pb.Chunk()
        lie.CopyFrom(one[place].chunk)
        for field, value in changes.items():
            setattr(lie, field, value)
        with pytest.raises(reason) as caught:
            receiver.add(lie, one[place].payload)
        assert type(caught.value) is reason, changes


def test_no_memory_is_taken_for_what_is_too_large() -> None:
    chunk = pb.Chunk(epoch=EPOCH, step=0, tensor_count=1, tensor="a", dtype=pb.FLOAT32, shape=[1 << 40], count=1)
    with pytest.raises(TensorError, match=r"announces 4398046511104 bytes, more than 4096"):
        joined().add(chunk, memoryview(b""))


@pytest.mark.parametrize(
    ("announced", "dtype", "fits"),
    [((3, 8), pb.BFLOAT16, True), ((0, 8), pb.BFLOAT16, True), ((3, 9), pb.BFLOAT16, False), ((8,), pb.BFLOAT16, False),
     ((3, 8), pb.FLOAT16, False)],
)  # fmt: skip
def test_a_stage_takes_only_what_was_agreed_on(announced: tuple[int, ...], dtype: int, fits: bool) -> None:
    receiver = joined(HandoffSettings(), {"hidden": Expected(mx.bfloat16, (None, 8))})
    data = memoryview(bytes(2 * int(np.prod(announced))))
    chunk = pb.Chunk(epoch=EPOCH, tensor_count=1, tensor="hidden", dtype=dtype, shape=announced, count=1)
    if fits:
        assert receiver.add(chunk, data) is not None
        return
    with pytest.raises(TensorError, match=r"hidden came as .*but .*bfloat16 of shape \('any', 8\) was agreed on"):
        receiver.add(chunk, data)


def test_a_name_that_was_not_agreed_on_is_refused() -> None:
    receiver = joined(expects={"hidden": Expected(mx.int32, (None,))})
    with pytest.raises(TensorError, match=r"t0 .* was not agreed on, only hidden"):
        receiver.add(pieces_of([[[1]]])[0].chunk, memoryview(bytes(4)))


def test_a_connection_of_another_link_is_refused() -> None:
    receiver = joined(SMALL)
    receiver.begin(HELLO)  # the same again: resumed
    for reason, changes in (
        (EpochError, {"epoch": 4}),
        (SessionError, {"session": b"x"}),
        (SessionError, {"window_bytes": 1}),
    ):
        other = pb.Hello()
        other.CopyFrom(HELLO)
        for field, value in changes.items():
            setattr(other, field, value)
        with pytest.raises(reason):
            receiver.begin(other)


def test_a_sender_that_ignores_its_credit_is_refused() -> None:
    receiver = joined(SMALL)
    with pytest.raises(CreditError, match="window is 2048"):  # noqa: PT012 - from whichever of them
        for piece in pieces_of([[[1]]] * 100):
            receiver.add(piece.chunk, piece.payload)
    assert receiver.held < SMALL.window_bytes + 1024


# --- window and reassembly together -----------------------------------------------------------------------------------


class Link(RuleBasedStateMachine):
    """A sender and a receiver over a connection that delivers in order, late, doubled in part, and is cut anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.window = SendWindow(EPOCH, SMALL)
        self.receiver = joined(SMALL)
        self.sent: list[list[list[int]]] = []
        self.came: list[list[list[int]]] = []
        self.whole: list[Step] = []
        self.wire: list[Piece] = []
        self.answers: list[pb.Accepted] = []
        self.connected = False

    @rule(tensors=st.lists(st.lists(st.integers(0, 1 << 20), max_size=30), min_size=1, max_size=2))
    def send(self, tensors: list[list[int]]) -> None:
        if self.window.admits:
            self.window.offer(len(self.sent), [words(f"t{i}", values) for i, values in enumerate(tensors)])
            self.sent.append(tensors)

    @rule()
    def connect(self) -> None:
        self.wire, self.answers, self.connected = [], [], True
        self.receiver.begin(HELLO)
        self.window.suspend()
        self.window.resume(self.receiver.accepted())

    @rule()
    def cut(self) -> None:
        self.wire, self.answers, self.connected = [], [], False
        self.window.suspend()

    @rule(count=st.integers(1, 20))
    def write(self, count: int) -> None:
        for _ in range(count):
            piece = self.window.next_piece()
            if piece is not None:
                assert self.connected
                self.wire.append(piece)

    @rule(count=st.integers(1, 20), doubled=st.booleans())
    def deliver(self, count: int, doubled: bool) -> None:
        arrived, self.wire = self.wire[:count], self.wire[count:]
        for piece in arrived * (2 if doubled else 1):
            step = self.receiver.add(piece.chunk, piece.payload)
            if step is not None:
                self.whole.append(step)
                self.answers.append(self.receiver.accepted())

    @precondition(lambda self: self.answers)
    @rule()
    def answer(self) -> None:
        self.window.accepted(self.answers.pop(0))

    @precondition(lambda self: self.whole)
    @rule()
    def take(self) -> None:
        step = self.whole.pop(0)
        self.came.append(values_of(step))
        self.receiver.consume(step)
        if self.connected:
            self.answers.append(self.receiver.accepted())

    @invariant()
    def exactly_once_and_in_order(self) -> None:
        whole = self.came + [values_of(step) for step in self.whole]
        assert whole == self.sent[: len(whole)]

    @invariant()
    def memory_is_bounded(self) -> None:
        largest = 2 * (30 * 4 + 15 * 256)
        assert self.receiver.held <= SMALL.window_bytes + largest
        assert self.window.in_flight <= SMALL.window_bytes + largest

    def teardown(self) -> None:
        """Whatever happened, a connection that stays up brings the rest."""
        self.connect()
        self.write(10_000)
        self.deliver(10_000, doubled=False)
        while self.whole:
            self.take()
        assert self.came == self.sent
        while self.answers:
            self.answer()
        assert self.window.is_empty
        assert self.window.in_flight == 0


TestLink = Link.TestCase
TestLink.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("next_seq", "consumed"), [(3, 0), (0, 0), (1, 10_000), (1, -1)])
def test_an_impossible_answer_is_refused(next_seq: int, consumed: int) -> None:
    window = SendWindow(EPOCH, SMALL)
    window.resume(pb.Accepted())
    for step in range(2):
        window.offer(step, [words("a", [step])])
    window.accepted(pb.Accepted(next_seq=1, consumed=260))
    with pytest.raises(SessionError):
        window.accepted(pb.Accepted(next_seq=next_seq, consumed=max(consumed, 0)))


def test_a_step_larger_than_the_window_goes_alone() -> None:
    window = SendWindow(EPOCH, SMALL)
    window.offer(0, [words("a", [0] * 1000)])
    assert not window.admits
    window.resume(pb.Accepted(next_seq=window.end_seq, consumed=0))
    assert window.is_empty
    assert not window.admits, "accepted, but not yet taken"
    window.accepted(pb.Accepted(next_seq=window.end_seq, consumed=window.in_flight))
    assert window.admits


def test_steps_grow_and_have_a_largest_size() -> None:
    window = SendWindow(EPOCH, SMALL)
    window.offer(3, [words("a", [1])])
    with pytest.raises(StepError, match="step 3 was to be sent after step 3"):
        window.offer(3, [words("a", [1])])
    with pytest.raises(TensorError, match="4096 at most"):
        window.offer(4, [words("a", [1] * 2000)])


# --- the rest -------------------------------------------------------------------------------------------------------


def test_patience_ends_unless_there_is_progress() -> None:
    limits = HandoffSettings(away_s=3.0, pause_s=0.1, max_pause_s=0.4)
    patience = Patience(limits)
    assert [patience.lost(t) for t in (10.0, 10.5, 11.0, 11.5, 12.9, 13.1)] == pytest.approx(
        [0.1, 0.2, 0.4, 0.4, 0.1, None]
    )
    patience.progress()
    assert patience.lost(20.0) == pytest.approx(0.1)
    assert patience.lost(23.0) is None


@pytest.mark.parametrize(
    ("address", "refused"),
    [("127.0.0.1:1", False), ("127.3.4.5:1", False), ("[::1]:1", False), ("localhost:1", False), ("10.0.0.1:1", True),
     ("0.0.0.0:0", True), ("[::]:0", True), ("mac.local:1", True)],
)  # fmt: skip
def test_plain_text_stays_on_loopback(address: str, refused: bool) -> None:
    check_plaintext(address, None, HandoffSettings(allow_plaintext=True))
    if not refused:
        check_plaintext(address, None, HandoffSettings())
        return
    with pytest.raises(PlaintextRefusedError, match="allow_plaintext=True"):
        check_plaintext(address, None, HandoffSettings())


@pytest.mark.parametrize("offered", ["", "t", "Bearer ", "Bearer T", "bearer t", "Bearer t "])
def test_only_the_token_is_the_token(offered: str) -> None:
    assert not is_bearer((("authorization", offered),), "t")
    assert not is_bearer((), "t")
    assert is_bearer((("authorization", "Bearer t"),), "t")


def test_a_certificate_that_is_none_is_named() -> None:
    with pytest.raises(CredentialsError, match="The rack's key is not in PEM form"):
        Tls(b"-----BEGIN CERTIFICATE-----", b"", b"-----BEGIN CERTIFICATE-----")
    assert (
        b"secret"
        not in repr(
            Tls(b"-----BEGIN CERTIFICATE-----", b"PRIVATE KEY-----secret", b"-----BEGIN CERTIFICATE-----")
        ).encode()
    )


@pytest.mark.parametrize(
    "changes", [{"chunk_bytes": 0}, {"chunk_bytes": MAX_CHUNK_BYTES + 1}, {"window_bytes": 0}, {"away_s": 0.0}]
)
def test_impossible_settings_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        HandoffSettings(**changes)
