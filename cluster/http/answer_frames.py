"""What an ingress and a replica say to each other of one request, over a sealed connection of the two.

    replica: BEGUN(ticket, its name) --> ingress: ASKED, BODY ..., ASKED_ALL --> replica: HEAD, PIECE ..., END
                                                                            `-- ALIVE(its Room) each second
                                                                            `-- LOST, MOVED, GONE, FAILED instead of END
    ingress: TAKEN, and where it keeps the connection at once or later: ASKED, BODY ... --> replica: BEGUN, HEAD, ...
    instead of PIECE: TOLD, a piece and the tokens behind it (progress.py); GROUPS, tokens without a piece
    behind ASKED, where another replica began the answer: RESUME ..., its Resume

A message is a byte that says its kind, and the rest. After TAKEN the connection is free for another request: of the
ingress if it keeps connections (ReplyTo.keeps), else of the replica's next call.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.progress import Resume

PIECE_BYTES = 1 << 16
"""Of a body or an answer in one message, at most."""
TICKET_BYTES = 16

_STATUS = struct.Struct(">H")
_GROUP_BYTES = struct.Struct(">I")
_RESUME = struct.Struct(">II")


class Kind(IntEnum):
    """Kinds of messages."""

    BEGUN = 1
    ASKED = 2
    BODY = 3
    ASKED_ALL = 4
    ALIVE = 5
    HEAD = 6
    PIECE = 7
    END = 8
    LOST = 9
    FAILED = 10
    TAKEN = 11
    TOLD = 12
    GROUPS = 13
    RESUME = 14
    UNRESUMABLE = 15
    GONE = 16
    MOVED = 17


_KINDS = {int(kind): kind for kind in Kind}
"""Kind(number) takes three times as long."""

ENDS = frozenset({Kind.END, Kind.LOST, Kind.MOVED, Kind.GONE, Kind.FAILED})
"""Of an answer."""


@dataclass(frozen=True)
class Asked:
    """A request without its body.

    Attributes:
        headers: those that an engine is told.
        seed: of the ids that are drawn for its answer; "": no other replica is to go on with it, and nothing is told of
            its tokens. resume: an answer that another replica began.
    """

    method: str
    path: str
    headers: tuple[tuple[str, str], ...] = ()
    seed: str = ""
    resume: Resume | None = None


def frame(kind: Kind, rest: bytes = b"") -> bytes:
    """A message."""
    return bytes([kind]) + rest


def parted(message: bytes) -> tuple[Kind, bytes]:
    """Its kind and the rest. Raises ValueError for one that is none of ours."""
    if not message or message[0] not in _KINDS:
        raise ValueError("no message of ours")
    return _KINDS[message[0]], message[1:]


def in_pieces(kind: Kind, content: bytes) -> Iterator[bytes]:
    """Messages of at most PIECE_BYTES of `content` each; none for nothing."""
    if len(content) <= PIECE_BYTES:
        if content:
            yield frame(kind, content)
        return
    view = memoryview(content)
    for start in range(0, len(content), PIECE_BYTES):
        yield frame(kind, bytes(view[start : start + PIECE_BYTES]))


def asking(asked: Asked) -> Iterator[bytes]:
    """The messages that say what is asked."""
    resume = b"" if asked.resume is None else packed_resume(asked.resume)
    yield frame(Kind.ASKED, json.dumps([asked.method, asked.path, asked.headers, asked.seed, len(resume)]).encode())
    yield from in_pieces(Kind.RESUME, resume)


def unpacked_asked(rest: bytes) -> tuple[Asked, int]:
    """Of ASKED; and how many bytes of a Resume follow."""
    method, path, headers, seed, resume_bytes = json.loads(rest)
    return Asked(method, path, tuple((name, value) for name, value in headers), seed), resume_bytes


def packed_resume(resume: Resume) -> bytes:
    """For RESUME."""
    return _RESUME.pack(resume.messages, len(resume.first)) + resume.first + resume.groups


def unpacked_resume(content: bytes) -> Resume:
    """Of RESUME, all of them."""
    messages, first = _RESUME.unpack_from(content)
    at = _RESUME.size + first
    return Resume(messages, content[at:], content[_RESUME.size : at])


def told(groups: bytes, piece: bytes) -> bytes:
    """A TOLD message; `piece` of at most PIECE_BYTES."""
    return frame(Kind.TOLD, _GROUP_BYTES.pack(len(groups)) + groups + piece)


def parted_told(rest: bytes) -> tuple[bytes, bytes]:
    """Of TOLD: groups, piece."""
    at = _GROUP_BYTES.size + _GROUP_BYTES.unpack_from(rest)[0]
    return rest[_GROUP_BYTES.size : at], rest[at:]


def packed_head(head: Head) -> bytes:
    """For HEAD."""
    return _STATUS.pack(head.status) + head.media_type.encode("latin-1")


def unpacked_head(rest: bytes) -> Head:
    """Of HEAD."""
    return Head(_STATUS.unpack_from(rest)[0], rest[_STATUS.size :].decode("latin-1"))
