"""The answer of a request that another replica began: what the client has of it is left out.

    vLLM's application --head, pieces, from the beginning--> Resumed --the rest, as of the same moment--> the line

What is shown again (engine/resumption.py) is the same but for the time at which it says that it was made. That of the
first replica is in the first message that the client has.
"""

import re

from pomarium.cluster.http.answer_frames import PIECE_BYTES
from pomarium.cluster.http.asgi_bridge import Exchange, Head
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.replica.loss import EVENT_STREAM, EngineFaultError, error_event

_CREATED = re.compile(rb'("created(?:_at)?": ?)(\d+)')
"""In the events of chats, completions and responses. Inside of a string its quotes would have backslashes."""


class Resumed:
    """An Exchange that passes the rest of an answer on to `exchange`.

    Attributes:
        gone: of `exchange`.
    """

    def __init__(self, exchange: Exchange, resume: Resume) -> None:
        self.gone = exchange.gone
        self._exchange = exchange
        self._left = resume.messages
        self._first = resume.first
        self._begun = False
        self._own: re.Pattern[bytes] | None = None
        self._created = b""

    async def body(self) -> tuple[bytes, bool] | None:
        """See Exchange."""
        return await self._exchange.body()

    async def head(self, head: Head) -> None:
        """The client has it. Raises EngineFaultError if it is another than that of a stream which can go on."""
        if head.status != 200 or not head.media_type.startswith(EVENT_STREAM):
            raise EngineFaultError(f"it could not be resumed: it was answered with status {head.status}")

    async def piece(self, piece: bytes) -> None:
        """See Exchange. Raises EngineFaultError instead of leaving out that the request failed."""
        if not self._begun:
            self._begun = True
            self._compare(piece)
        if self._own is not None:
            piece = self._own.sub(self._created, piece)
        messages = -(-len(piece) // PIECE_BYTES)
        if self._left >= messages:
            if error_event(piece) is not None:
                raise EngineFaultError("it could not be resumed: the request failed where it had not failed before")
            self._left -= messages
            return
        rest, self._left = piece[self._left * PIECE_BYTES :], 0
        await self._exchange.piece(rest)

    def end(self) -> None:
        """The application has answered. Raises EngineFaultError if the client, who waits, has more than came again."""
        if self._left and not self.gone.is_set():
            raise EngineFaultError(f"it could not be resumed: {self._left} pieces of what came did not come again")

    def _compare(self, piece: bytes) -> None:
        """Find the two times, in the first message then and now."""
        own, first = _CREATED.search(piece), _CREATED.search(self._first)
        if own is not None and first is not None and own[2] != first[2]:
            self._own = re.compile(rb'("created(?:_at)?": ?)%b\b' % own[2])
            self._created = rb"\g<1>" + first[2]

    def give_up(self) -> None:
        """See Exchange."""
        self._exchange.give_up()
