"""The sender's half of a link, without sockets: what is still to be sent, and whether more may be.

    offer(step) --> pieces ... next_piece() --> connection
    receiver's Accepted --> accepted() frees pieces and returns credit; resume() after a cut sends the rest again

Credit is counted in whole steps: a step may go while less than the window is unconsumed at the receiver. So a step
larger than the window still passes, alone, and no more than the window and one step is ever held.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.errors import SessionError, StepError, TensorError
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import Tensor

CHUNK_COST = 256
"""What a chunk costs beside its payload, so that steps of empty tensors do not pass for free."""


def cost(payload_bytes: int) -> int:
    """What a chunk takes from the window."""
    return payload_bytes + CHUNK_COST


@dataclass(frozen=True)
class Piece:
    """A chunk and its payload, a view of the tensor's memory."""

    chunk: pb.Chunk
    payload: memoryview


class SendWindow:
    """Pieces from the first that the receiver may lack to the last offered. Not thread-safe."""

    def __init__(self, epoch: int, settings: HandoffSettings) -> None:
        self._epoch, self._settings = epoch, settings
        self._pieces: deque[Piece] = deque()
        self._first_seq = 0  # of _pieces
        self._cursor: int | None = None  # the next to be sent; None between connections
        self._last_step = -1
        self._offered = self._consumed = 0  # cost since the link began

    @property
    def end_seq(self) -> int:
        """One more than the last piece offered."""
        return self._first_seq + len(self._pieces)

    @property
    def first_seq(self) -> int:
        """The first piece that the receiver may lack."""
        return self._first_seq

    @property
    def is_empty(self) -> bool:
        """Whether the receiver has all that was offered."""
        return not self._pieces

    @property
    def in_flight(self) -> int:
        """Cost of what was offered and, as far as is known, not yet taken by the receiving stage."""
        return self._offered - self._consumed

    @property
    def admits(self) -> bool:
        """Whether a step may be offered now."""
        return self.in_flight < self._settings.window_bytes

    def offer(self, step: int, tensors: Sequence[Tensor]) -> None:
        """Adds a step. Raises StepError if steps do not grow, TensorError for a step that is too large."""
        if step <= self._last_step:
            raise StepError(f"step {step} was to be sent after step {self._last_step}: steps must grow")
        total = sum(tensor.nbytes for tensor in tensors)
        if total > self._settings.max_step_bytes:
            raise TensorError(f"step {step} has {total} bytes, but a step has {self._settings.max_step_bytes} at most")
        self._last_step = step
        for index, tensor in enumerate(tensors):
            for piece in self._split(step, tensor, index, len(tensors)):
                self._pieces.append(piece)
                self._offered += cost(len(piece.payload))

    def next_piece(self) -> Piece | None:
        """The next to be sent on this connection; None if there is none, or no connection."""
        if self._cursor is None or self._cursor == self.end_seq:
            return None
        piece = self._pieces[self._cursor - self._first_seq]
        self._cursor += 1
        return piece

    def suspend(self) -> None:
        """The connection is gone: nothing is to be sent until `resume`."""
        self._cursor = None

    def resume(self, answer: pb.Accepted) -> None:
        """The receiver said on a new connection what it has. Raises SessionError if the rest cannot be sent."""
        self._advance(answer)
        self._cursor = self._first_seq

    def accepted(self, answer: pb.Accepted) -> None:
        """The receiver has all before `next_seq`. Raises SessionError if that cannot be."""
        self._advance(answer)
        if self._cursor is not None and self._cursor < self._first_seq:
            self._cursor = self._first_seq

    def _advance(self, answer: pb.Accepted) -> None:
        if not self._first_seq <= answer.next_seq <= self.end_seq:
            raise SessionError(
                f"the receiver wants to go on at chunk {answer.next_seq}, but {self._first_seq} to {self.end_seq} "
                "are held: it is not the one that this link began with"
            )
        if not self._consumed <= answer.consumed <= self._offered:
            raise SessionError(
                f"the receiver claims to have consumed {answer.consumed} bytes, but {self._consumed} before "
                f"and {self._offered} were sent"
            )
        while self._first_seq < answer.next_seq:
            self._pieces.popleft()
            self._first_seq += 1
        self._consumed = answer.consumed

    def _split(self, step: int, tensor: Tensor, index: int, count: int) -> list[Piece]:
        size = self._settings.chunk_bytes
        starts = range(0, max(len(tensor.data), 1), size)
        return [
            Piece(
                pb.Chunk(
                    seq=self.end_seq + number,
                    epoch=self._epoch,
                    step=step,
                    tensor_index=index,
                    tensor_count=count,
                    tensor=tensor.name,
                    dtype=tensor.dtype,
                    shape=tensor.shape,
                    index=number,
                    count=len(starts),
                ),
                tensor.data[start : start + size],
            )
            for number, start in enumerate(starts)
        ]
