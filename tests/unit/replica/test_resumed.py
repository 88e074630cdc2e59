"""What of an answer that is shown again reaches the line."""

import asyncio

import pytest

from pomarium.cluster.http.answer_frames import PIECE_BYTES
from pomarium.cluster.http.asgi_bridge import Collected, Head
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.replica.loss import EngineFaultError
from pomarium.cluster.replica.resumed import Resumed


def passed(resume: Resume, *pieces: bytes, ends: bool = False) -> bytes:
    async def play() -> bytes:
        exchange = Collected(b"")
        resumed = Resumed(exchange, resume)
        await resumed.head(Head(200, "text/event-stream; charset=utf-8"))
        for piece in pieces:
            await resumed.piece(piece)
        if ends:
            resumed.end()
        return b"".join(exchange._pieces)

    return asyncio.run(play())


def test_pieces_that_the_client_has_are_left_out() -> None:
    assert passed(Resume(2, b"", b"one"), b"one", b"two", b"three", b"four") == b"threefour"
    assert passed(Resume(0, b"", b""), b"one", b"two") == b"onetwo"
    assert passed(Resume(3, b"", b"one"), b"one", b"two") == b""


def test_of_a_piece_that_came_in_part_the_rest_comes() -> None:
    large = bytes(PIECE_BYTES) + b"\1" * PIECE_BYTES + b"\2\2"
    assert passed(Resume(2, b"", b"one"), b"one", large) == large[PIECE_BYTES:]


def test_the_answer_stays_of_the_moment_in_which_it_began() -> None:
    first = b'data: {"id":"a","created":100,"choices":[]}\n\n'
    own = b'data: {"id":"a","created":123,"choices":[]}\n\n'
    said = b'data: {"created":123,"text":"{\\"created\\":123, 123}","usage":1230}\n\n'
    assert passed(Resume(1, b"", first), own, said) == said.replace(b'{"created":123,', b'{"created":100,')
    assert passed(Resume(1, b"", b'{"created_at": 99}'), b'{"created_at": 98}', b'{"created_at": 98}') == (
        b'{"created_at": 99}'
    )


def test_a_failure_is_not_left_out_with_what_the_client_has() -> None:
    with pytest.raises(EngineFaultError, match="failed where it had not failed before"):
        passed(Resume(3, b"", b"one"), b"one", b'data: {"error": {"message": "no grammar"}}\n\n', b"data: [DONE]\n\n")
    with pytest.raises(EngineFaultError, match="1 pieces of what came did not come again"):
        passed(Resume(3, b"", b"one"), b"one", b"two", ends=True)
    assert passed(Resume(1, b"", b"one"), b"one", b"two", ends=True) == b"two"


@pytest.mark.parametrize("head", [Head(400, "application/json"), Head(200, "application/json")])
def test_an_answer_of_another_kind_is_none(head: Head) -> None:
    with pytest.raises(EngineFaultError, match="could not be resumed"):
        asyncio.run(Resumed(Collected(b""), Resume(1, b"", b"")).head(head))
