"""What a replica has room for, as it tells its ingresses with each sign of life (answer_frames.py, ALIVE). Pure."""

import struct
from dataclasses import dataclass

_ROOM = struct.Struct(">IQ")


@dataclass(frozen=True)
class Room:
    """Attributes:
    slots: requests that it is to have at once. tokens: of its KV cache.
    """

    slots: int
    tokens: int

    def packed(self) -> bytes:
        """For ALIVE."""
        return _ROOM.pack(self.slots, self.tokens)

    @classmethod
    def unpacked(cls, content: bytes) -> "Room":
        """Of ALIVE. Raises ValueError if it holds none."""
        try:
            return cls(*_ROOM.unpack(content))
        except struct.error:
            raise ValueError("no room of ours") from None
