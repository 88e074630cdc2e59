"""Tokens in groups, as they travel with an answer, and what another engine is told of it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.http.answer_frames import (
    PIECE_BYTES,
    Asked,
    Kind,
    asking,
    packed_resume,
    parted,
    parted_told,
    told,
    unpacked_asked,
    unpacked_resume,
)
from pomarium.cluster.http.progress import Finish, Group, Part, Resume, groups_of, pack_group, pack_part

TOKENS = st.integers(0, 2**32 - 1)
PARTS = st.builds(
    Part,
    st.integers(0, 2**16 - 1),
    st.lists(TOKENS, max_size=5).map(tuple),
    st.sampled_from(Finish),
    st.none() | st.integers(0, 2**31 - 1),
)
GROUPS = st.lists(st.builds(Group, st.lists(PARTS, max_size=4).map(tuple), TOKENS), max_size=6).map(tuple)


def packed(groups: tuple[Group, ...]) -> bytes:
    into = bytearray()
    for group in groups:
        pack_group(into, len(group.parts), group.cached)
        for part in group.parts:
            pack_part(into, part.index, part.token_ids, part.finish, part.stop_token)
    return bytes(into)


@given(GROUPS)
def test_groups_come_back_as_they_were(groups: tuple[Group, ...]) -> None:
    assert groups_of(packed(groups)) == groups


@given(GROUPS.filter(bool), st.integers(1, 3))
def test_a_part_of_them_is_refused(groups: tuple[Group, ...], missing: int) -> None:
    with pytest.raises(ValueError, match="no groups"):
        groups_of(packed(groups)[:-missing])


@given(st.integers(0, 2**32 - 1), st.binary(max_size=99), st.binary(max_size=99))
def test_a_resume_comes_back_as_it_was(messages: int, groups: bytes, first: bytes) -> None:
    resume = Resume(messages, groups, first)
    assert unpacked_resume(packed_resume(resume)) == resume


@given(st.binary(max_size=99), st.binary(max_size=99))
def test_a_piece_and_its_tokens_are_told_apart(groups: bytes, piece: bytes) -> None:
    kind, rest = parted(told(groups, piece))
    assert (kind, parted_told(rest)) == (Kind.TOLD, (groups, piece))


def test_a_long_answer_is_resumed_in_messages_of_bounded_size() -> None:
    resume = Resume(7, bytes(3 * PIECE_BYTES), b"first")
    first, *rest = asking(Asked("POST", "/v1/completions", (("a", "b"),), "seed", resume))
    kind, head = parted(first)
    asked, size = unpacked_asked(head)
    assert (kind, asked) == (Kind.ASKED, Asked("POST", "/v1/completions", (("a", "b"),), "seed"))
    assert all(parted(message)[0] is Kind.RESUME and len(message) <= PIECE_BYTES + 1 for message in rest)
    content = b"".join(parted(message)[1] for message in rest)
    assert (len(content), unpacked_resume(content)) == (size, resume)
