"""Sealed messages: what two ends of a TCP connection that share a key make of bytes, and back. No sockets here.

    message --Seal.sealed--> length, AES-256-GCM --any pieces--> SealedBuffer.messages --> message

Each end counts what it seals and opens, and the count is the nonce: what is altered, lost, repeated or of another
connection does not open. So a key serves one connection. Where it cannot be a new one each time, `connection_key`
makes one of what both ends bring along.
"""

import hashlib
import struct
from collections.abc import Iterator
from enum import IntEnum

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
SALT_BYTES = 32
LENGTH = struct.Struct(">Q")
"""What stands before each sealed message: its bytes."""

_TAG_BYTES = 16
_COUNT_BYTES = 11


class End(IntEnum):
    """Which end of a connection, the first byte of its nonces."""

    DIALLED = 0
    LISTENED = 1


class WireError(ConnectionError):
    """The connection is over, what came was not sealed by the other end, or a message is too large."""


def connection_key(secret: bytes, dialled: bytes, listened: bytes) -> bytes:
    """The key of one connection, from a `secret` of KEY_BYTES that serves many and a fresh salt of each end."""
    return hashlib.blake2b(dialled + listened, key=secret, digest_size=KEY_BYTES).digest()


class Seal:
    """One end's way to seal and to open."""

    def __init__(self, key: bytes, end: End) -> None:
        """`key`: KEY_BYTES, of this connection alone."""
        self._cipher = AESGCM(key)
        self._near, self._far = bytes([end]), bytes([1 - end])
        self._sealed = self._opened = 0

    def sealed(self, message: bytes) -> bytes:
        """Length and sealed message, to be sent in the order of these calls."""
        sealed = self._cipher.encrypt(self._near + self._sealed.to_bytes(_COUNT_BYTES), message, None)
        self._sealed += 1
        return LENGTH.pack(len(sealed)) + sealed

    def opened(self, sealed: bytes) -> bytes:
        """The message in the next `sealed` one. Raises WireError."""
        try:
            message = self._cipher.decrypt(self._far + self._opened.to_bytes(_COUNT_BYTES), sealed, None)
        except InvalidTag:
            raise WireError("what it sent was altered on the way") from None
        self._opened += 1
        return message


def checked_length(head: bytes | bytearray, most: int) -> int:
    """Of the sealed message whose LENGTH begins `head`. Raises WireError if it holds more than `most` bytes."""
    length: int = LENGTH.unpack_from(head)[0]
    if length > most + _TAG_BYTES:
        raise WireError(f"it sent a message of {length} bytes where {most} are the most")
    return length


class SealedBuffer:
    """Received bytes, until they are whole messages."""

    def __init__(self, seal: Seal, most: int) -> None:
        """`most`: bytes of a message."""
        self._seal, self._most = seal, most
        self._buffer = bytearray()

    def messages(self, received: bytes) -> Iterator[bytes]:
        """Those that are whole with `received`, in order. Raises WireError; nothing can be received any more then."""
        self._buffer += received
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + checked_length(self._buffer, self._most)
            if len(self._buffer) < end:
                return
            sealed = bytes(memoryview(self._buffer)[LENGTH.size : end])
            del self._buffer[:end]
            yield self._seal.opened(sealed)
