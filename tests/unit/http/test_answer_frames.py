"""Messages between an ingress and a replica, as bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.http.answer_frames import (
    PIECE_BYTES,
    Asked,
    Kind,
    asking,
    frame,
    in_pieces,
    packed_head,
    parted,
    unpacked_asked,
    unpacked_head,
)
from pomarium.cluster.http.asgi_bridge import Head

latin = st.text(st.characters(max_codepoint=255))


@given(st.sampled_from(Kind), st.binary())
def test_a_message_comes_apart_as_it_was_made(kind: Kind, rest: bytes) -> None:
    assert parted(frame(kind, rest)) == (kind, rest)


@pytest.mark.parametrize("message", [b"", b"\x00", b"\xff rest"])
def test_what_is_no_message_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="no message of ours"):
        parted(message)


@given(st.builds(Asked, st.text(), st.text(), st.lists(st.tuples(latin, latin)).map(tuple), st.text()))
def test_a_request_arrives(asked: Asked) -> None:
    (message,) = asking(asked)
    kind, rest = parted(message)
    assert (kind, unpacked_asked(rest)) == (Kind.ASKED, (asked, 0))


@given(st.builds(Head, st.integers(100, 599), latin))
def test_a_head_arrives(head: Head) -> None:
    assert unpacked_head(packed_head(head)) == head


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_content_is_sent_in_pieces(size: int) -> None:
    content = bytes(size)
    messages = [parted(message) for message in in_pieces(Kind.PIECE, content)]
    assert b"".join(rest for _, rest in messages) == content
    assert all(kind is Kind.PIECE and 0 < len(rest) <= PIECE_BYTES for kind, rest in messages)
