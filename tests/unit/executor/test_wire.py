"""A wire's messages and who is let in at its entrance: over real sockets, without gRPC."""

import socket
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.executor import entrance, wire
from pomarium.cluster.executor.entrance import Entrance, dial
from pomarium.cluster.executor.wire import Wire
from pomarium.cluster.http.sealing import KEY_BYTES, End, WireError

KEY, OTHER = bytes(KEY_BYTES), bytes([1]) * KEY_BYTES
WAIT_S = 10.0
PROMPT = b"a user's prompt"


class Ends:
    """Two wires, with what the engine's sends held in between."""

    def __init__(self) -> None:
        near, self._out = socket.socketpair()
        self._in, far = socket.socketpair()
        self._ends = (near, self._out, self._in, far)
        self.engine, self.worker = Wire(near, KEY, End.DIALLED), Wire(far, KEY, End.LISTENED)

    def take(self) -> bytes:
        """What the engine's end has sent since."""
        return self._out.recv(1 << 20)

    def give(self, data: bytes) -> None:
        """To the worker's end."""
        self._in.sendall(data)

    def end(self) -> None:
        self._in.close()

    def close(self) -> None:
        for one in self._ends:
            one.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 400), max_size=40))
def test_messages_arrive_whole_and_in_order_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    ends = Ends()
    for message in messages:
        ends.engine.send(message)
    sent, at = ends.take() if messages else b"", 0
    received: list[bytes] = []
    reading = threading.Thread(target=lambda: received.extend(ends.worker.receive() for _ in messages))
    reading.start()
    for cut in [*cuts, len(sent)]:
        ends.give(sent[at : at + cut])
        at += cut
    reading.join(WAIT_S)
    ends.close()
    assert received == messages


def test_a_message_of_many_pieces() -> None:
    near, far = socket.socketpair()
    engine, worker = Wire(near, KEY, End.DIALLED), Wire(far, KEY, End.LISTENED)
    message = bytes(range(256)) * (20 << 12)
    threading.Thread(target=engine.send, args=(message,)).start()
    assert worker.receive() == message
    engine.close()
    worker.close()


def test_what_passes_is_not_readable(ends: Ends) -> None:
    ends.engine.send(PROMPT)
    sent = ends.take()
    assert len(sent) > len(PROMPT)
    assert PROMPT not in sent


@pytest.mark.parametrize("at", [8, 12, -1])
def test_what_is_altered_ends_the_wire(ends: Ends, at: int) -> None:
    ends.engine.send(PROMPT)
    sent = bytearray(ends.take())
    sent[at] ^= 1
    ends.give(bytes(sent))
    with pytest.raises(WireError, match="altered"):
        ends.worker.receive()


def test_what_is_repeated_ends_the_wire(ends: Ends) -> None:
    ends.engine.send(PROMPT)
    sent = ends.take()
    ends.give(sent + sent)
    assert ends.worker.receive() == PROMPT
    with pytest.raises(WireError, match="altered"):
        ends.worker.receive()


def test_what_is_left_out_ends_the_wire(ends: Ends) -> None:
    ends.engine.send(PROMPT)
    ends.take()
    ends.engine.send(PROMPT)
    ends.give(ends.take())
    with pytest.raises(WireError, match="altered"):
        ends.worker.receive()


def test_what_an_end_sent_is_not_taken_back_by_it() -> None:
    near, far = socket.socketpair()
    engine = Wire(near, KEY, End.DIALLED)
    engine.send(PROMPT)
    far.sendall(far.recv(1 << 16))
    with pytest.raises(WireError, match="altered"):
        engine.receive()
    engine.close()
    far.close()


def test_a_message_is_refused_by_its_length_before_it_is_read(ends: Ends) -> None:
    ends.give(struct.pack(">Q", 1 << 40))
    with pytest.raises(WireError, match="a message of 1099511627776 bytes where 1073741824 are the most"):
        ends.worker.receive()


def test_nothing_is_no_message(ends: Ends) -> None:
    ends.give(struct.pack(">Q", 0))
    with pytest.raises(WireError, match="altered"):
        ends.worker.receive()


def test_a_message_that_would_be_refused_is_not_sent(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_MESSAGE_BYTES", 5)
    with pytest.raises(WireError, match="a message of 6 bytes is not sent: 5 are the most"):
        ends.engine.send(b"123456")
    ends.engine.send(b"12345")
    ends.give(ends.take())
    assert ends.worker.receive() == b"12345"


@pytest.mark.parametrize("sent", [0, 3, 20])
def test_the_end_of_the_connection_is_an_error(ends: Ends, sent: int) -> None:
    ends.engine.send(PROMPT)
    ends.give(ends.take()[:sent])
    ends.end()
    with pytest.raises(WireError, match="closed the connection"):
        ends.worker.receive()


def test_who_waits_is_released_when_the_wire_is_cut() -> None:
    near, far = socket.socketpair()
    engine = Wire(near, KEY, End.DIALLED)
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(engine.receive)
        engine.cut()
        assert isinstance(waiting.exception(WAIT_S), OSError)
    engine.close()
    engine.close()
    with pytest.raises(OSError, match=r"."):
        engine.send(PROMPT)
    far.close()


def test_the_engine_is_let_in_past_strangers() -> None:
    """Who is silent, who knows another key and who says too much hold up nobody."""
    opened = Entrance("127.0.0.1")
    silent, talking = (socket.create_connection(("127.0.0.1", opened.port)) for _ in range(2))
    talking.sendall(struct.pack(">Q", 1 << 30) + bytes(1 << 16))
    stranger = dial("127.0.0.1", opened.port, OTHER, WAIT_S)
    engine = dial("127.0.0.1", opened.port, KEY, WAIT_S)
    worker = opened.admit(KEY)
    engine.send(PROMPT)
    assert worker.receive() == PROMPT
    worker.send(PROMPT)
    assert engine.receive() == PROMPT
    with pytest.raises(OSError, match=r"."):
        stranger.receive()
    for end in (stranger, engine, worker):
        end.close()
    for one in (silent, talking):
        one.close()


def test_an_entrance_is_not_open_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrance, "ADMIT_S", 0.2)
    opened = Entrance("127.0.0.1")
    with pytest.raises(TimeoutError):
        opened.admit(KEY)
