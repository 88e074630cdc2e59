"""Sealed messages as bytes: whole and in order however they are cut, and nothing that anybody else made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.http.sealing import (
    KEY_BYTES,
    LENGTH,
    SALT_BYTES,
    End,
    Seal,
    SealedBuffer,
    WireError,
    connection_key,
)

SECRET = bytes(KEY_BYTES)
SALTS = bytes(SALT_BYTES), bytes([1]) * SALT_BYTES
MOST = 1000


def ends() -> tuple[Seal, Seal]:
    key = connection_key(SECRET, *SALTS)
    return Seal(key, End.DIALLED), Seal(key, End.LISTENED)


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(1, 400), max_size=40))
def test_messages_arrive_whole_and_in_order_however_they_are_cut(messages: list[bytes], cuts: list[int]) -> None:
    near, far = ends()
    sent = b"".join(near.sealed(message) for message in messages)
    buffer, received = SealedBuffer(far, MOST), []
    for cut in [*cuts, len(sent)]:
        received += buffer.messages(sent[:cut])
        sent = sent[cut:]
    assert received == messages


def test_what_is_altered_repeated_sent_back_or_of_another_connection_does_not_open() -> None:
    near, far = ends()
    sealed = near.sealed(b"a prompt")
    altered = sealed[:-1] + bytes([sealed[-1] ^ 1])
    other = Seal(connection_key(SECRET, SALTS[1], SALTS[0]), End.DIALLED).sealed(b"a prompt")
    echoed = far.sealed(b"an answer")
    for wrong in (altered, other, echoed):
        with pytest.raises(WireError, match="altered"):
            list(SealedBuffer(ends()[1], MOST).messages(wrong))
    with pytest.raises(WireError, match="altered"):
        list(SealedBuffer(far, MOST).messages(sealed + sealed))


def test_what_is_too_long_is_refused_by_its_length_alone() -> None:
    _, far = ends()
    with pytest.raises(WireError, match="a message of 10000 bytes where 1000 are the most"):
        list(SealedBuffer(far, MOST).messages(LENGTH.pack(10_000)))
