"""How far an answer has come, so that another engine can go on with it: tokens, in the groups in which they were shown.

    engine --pack_group, pack_part--> bytes --with the answer's pieces (answer_frames.py)--> the ingress, which keeps it
    the ingress --Resume--> another engine --groups--> the same pieces once more, and then those that are missing

What makes text, tool calls and events of tokens is a function of the groups in which it gets them. Given the same
groups it makes the same pieces, so nobody has to look into them: those that the client has are counted and left out.
The form is compact since each token of each stream costs it: little-endian integers without padding.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

_GROUP = struct.Struct("<HI")
_PART = struct.Struct("<HBiI")
_NO_TOKEN = -1


class Finish(IntEnum):
    """How a choice ended with a part."""

    NOT = 0
    STOP = 1
    LENGTH = 2
    OTHER = 3


@dataclass(frozen=True)
class Part:
    """New tokens of one choice.

    Attributes:
        index: of the choice. finish, stop_token: how it ended with them, and by which token if one was named.
    """

    index: int
    token_ids: tuple[int, ...]
    finish: Finish = Finish.NOT
    stop_token: int | None = None


@dataclass(frozen=True)
class Group:
    """What the engine showed at once.

    Attributes:
        cached: tokens of the prompt that were found in its cache.
    """

    parts: tuple[Part, ...]
    cached: int = 0


@dataclass(frozen=True)
class Resume:
    """What an engine needs to go on with an answer that another one began.

    Attributes:
        messages: PIECE messages of it that arrived. groups: packed, those that were told with them.
        first: the first of those messages; it has the time at which the answer began.
    """

    messages: int
    groups: bytes
    first: bytes


class Source(Protocol):
    """Who tells of an answer's tokens.

    Attributes:
        resumable: another engine could go on with the answer.
    """

    resumable: bool

    def taken(self) -> bytes:
        """Groups, packed, that the engine has shown since this was asked last."""
        ...


class Listener(Protocol):
    """Who wants to be told of an answer's tokens."""

    def tell(self, source: Source) -> None:
        """From now on `source` has what there is to tell."""
        ...


def pack_part(into: bytearray, index: int, token_ids: Sequence[int], finish: Finish, stop_token: int | None) -> None:
    """Append a part. token_ids: below 2**32."""
    stop = _NO_TOKEN if stop_token is None else stop_token
    into += _PART.pack(index, finish, stop, len(token_ids))
    into += struct.pack(f"<{len(token_ids)}I", *token_ids)


def pack_group(into: bytearray, parts: int, cached: int) -> None:
    """Begin a group of so many parts, which follow."""
    into += _GROUP.pack(parts, cached)


def groups_of(content: bytes) -> tuple[Group, ...]:
    """What `pack_group` and `pack_part` made. Raises ValueError for anything else."""
    try:
        return tuple(_groups(content))
    except struct.error as error:
        raise ValueError(f"these are no groups of tokens: {error}") from None


def _groups(content: bytes) -> Iterator[Group]:
    at = 0
    while at < len(content):
        count, cached = _GROUP.unpack_from(content, at)
        at += _GROUP.size
        parts = []
        for _ in range(count):
            index, finish, stop, tokens = _PART.unpack_from(content, at)
            at += _PART.size
            token_ids = struct.unpack_from(f"<{tokens}I", content, at)
            at += 4 * tokens
            parts.append(Part(index, token_ids, Finish(finish), None if stop == _NO_TOKEN else stop))
        yield Group(tuple(parts), cached)
