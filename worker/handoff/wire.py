"""Messages of `proto/handoff.proto` as bytes, with the payload copied once on the way out and not at all on the way in.

    head, payload --encode--> bytes --gRPC--> bytes --decode_frame--> head, memoryview of the payload

Protobuf's own encoder copies a payload three times and its decoder twice. This is the same encoding, which any
protobuf library reads, in one canonical form: head, CRC32C, payload. The CRC covers head and payload.
"""

from typing import TypeVar

from crc32c import crc32c
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.errors import ChecksumError, MalformedFrameError

_HEAD_TAG, _CRC_TAG, _PAYLOAD_TAG = 0x0A, 0x15, 0x1A
"""Field numbers 1, 2 and 3 with their wire types: length, 32 bits, length."""
_CRC_BYTES = 4

Head = TypeVar("Head", pb.FrameHead, pb.AnswerHead)


def encode(head: pb.FrameHead | pb.AnswerHead, payload: memoryview | bytes = b"") -> bytes:
    """A Frame or an Answer."""
    encoded = head.SerializeToString()
    prefix = bytearray((_HEAD_TAG,)) + _varint(len(encoded)) + encoded
    crc = crc32c(payload, crc32c(encoded)) if payload else crc32c(encoded)
    prefix.append(_CRC_TAG)
    prefix += crc.to_bytes(_CRC_BYTES, "little")
    if not payload:
        return bytes(prefix)
    prefix.append(_PAYLOAD_TAG)
    prefix += _varint(len(payload))
    return b"".join((prefix, payload))


def decode_frame(message: bytes) -> tuple[pb.FrameHead, memoryview]:
    """Head and payload of a Frame. Raises MalformedFrameError or ChecksumError."""
    encoded, payload = _split(message)
    return _parse(pb.FrameHead, encoded), payload


def decode_answer(message: bytes) -> pb.AnswerHead:
    """Head of an Answer. Raises MalformedFrameError or ChecksumError."""
    encoded, payload = _split(message)
    if payload:
        raise MalformedFrameError("an answer with a payload arrived")
    return _parse(pb.AnswerHead, encoded)


def _parse(kind: type[Head], encoded: memoryview) -> Head:
    try:
        head: Head = kind.FromString(bytes(encoded))
    except DecodeError as error:
        raise MalformedFrameError(f"a message arrived whose head is no protobuf: {error}") from None
    if head.WhichOneof("kind") is None:
        raise MalformedFrameError("a message of a kind that this version does not know arrived")
    return head


def _split(message: bytes) -> tuple[memoryview, memoryview]:
    view = memoryview(message)
    try:
        encoded, at = _field(view, 0, _HEAD_TAG)
        if view[at] != _CRC_TAG or len(view) < at + 1 + _CRC_BYTES:
            raise IndexError
        crc = int.from_bytes(view[at + 1 : at + 1 + _CRC_BYTES], "little")
        at += 1 + _CRC_BYTES
        payload = view[at:]
        if payload:
            payload, at = _field(view, at, _PAYLOAD_TAG)
            if at != len(view) or not payload:
                raise IndexError
    except IndexError:
        raise MalformedFrameError(f"{len(message)} bytes arrived that are no frame") from None
    if crc != (crc32c(payload, crc32c(encoded)) if payload else crc32c(encoded)):
        raise ChecksumError(f"a frame of {len(message)} bytes arrived altered: its CRC32C is another")
    return encoded, payload


def _field(view: memoryview, at: int, tag: int) -> tuple[memoryview, int]:
    """The field of type length at `at` and the place after it. Raises IndexError."""
    if view[at] != tag:
        raise IndexError
    length, shift = 0, 0
    while True:
        at += 1
        byte = view[at]
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
        shift += 7
        if shift > 35:
            raise IndexError
    start, end = at + 1, at + 1 + length
    if end > len(view):
        raise IndexError
    return view[start:end], end


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
