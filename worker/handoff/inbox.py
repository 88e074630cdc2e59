"""What one neighbour hands to this stage: the receiving end of a link.

    connection (server.py) --join, add--> Reassembler --whole steps--> queue --receive--> stage loop
                           <--answers---- credit <-------------------------------'

A connection that ends without Goodbye may be followed by another one; after `away_s` without one the link has failed.
"""

import queue
import threading
from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.errors import (
    HandoffError,
    HandoffTimeoutError,
    LinkClosedError,
    PeerLostError,
    StepError,
    as_refusal,
)
from pomarium.worker.handoff.reassembly import Reassembler, Step
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import unpack

REPORTS_PER_WINDOW = 8
"""Credit is returned in portions of this share of the window, and with each answer that goes out anyhow."""


class Connection(Protocol):
    """One stream from the sender."""

    def answer(self, head: pb.AnswerHead) -> None:
        """Send an answer, in order, without waiting."""
        ...

    def end(self) -> None:
        """End the stream after the answers given so far."""
        ...


class Inbox:
    """Steps from one peer.

    Attributes:
        rank: the peer's.
    """

    def __init__(
        self, rank: int, assembler: Reassembler, settings: HandoffSettings, on_failure: Callable[[HandoffError], None]
    ) -> None:
        self.rank = rank
        self._assembler, self._settings, self._on_failure = assembler, settings, on_failure
        self._changed = threading.Condition()
        self._connection: Connection | None = None
        self._failure: HandoffError | None = None
        self._steps: queue.SimpleQueue[Step | HandoffError] = queue.SimpleQueue()

    def receive(self, step: int, timeout_s: float | None) -> dict[str, mx.array]:
        """The tensors of the next step, which must be `step`.

        Raises HandoffTimeoutError if it is not there in time (None: it may take any), what the link failed with, or
        StepError, which fails it.
        """
        self._raise_failure()
        try:
            item = self._steps.get(timeout=timeout_s)
        except queue.Empty:
            raise HandoffTimeoutError(f"step {step} did not come from stage {self.rank} in {timeout_s:g} s") from None
        self._raise_failure()  # it may have come meanwhile
        if isinstance(item, HandoffError):
            self._steps.put(item)  # for whoever asks next
            raise item
        if item.step != step:
            error = StepError(f"step {item.step} came from stage {self.rank} where step {step} was due")
            self.fail(error)
            raise error
        arrays = {tensor.name: unpack(tensor) for tensor in item.tensors}
        self._return_credit(item)
        return arrays

    def fail(self, error: HandoffError) -> None:
        """Fail the link, tell the peer why, and call `on_failure`; only the first time counts."""
        if self._end(error, pb.AnswerHead(refusal=as_refusal(error))):
            self._on_failure(error)

    def close(self) -> None:
        """End the link without a fault: the peer is told, what waits raises LinkClosedError."""
        self._end(LinkClosedError(f"the link from stage {self.rank} was closed"), pb.AnswerHead(goodbye=pb.Goodbye()))

    def join(self, hello: pb.Hello, connection: Connection) -> None:
        """A connection of the peer begins; it takes the place of an earlier one. Raises what refuses it.

        A refused one fails the link too, unless the link has a connection: a stage of an old plan that wakes up must
        not end a link that works.
        """
        with self._changed:
            earlier = self._connection
            refusal: HandoffError | None = None
            try:
                self._raise_failure()
                self._assembler.begin(hello)
            except HandoffError as error:
                refusal = error
            else:
                self._connection = connection
                connection.answer(self._accepted())
                self._changed.notify_all()
        if refusal is not None:
            if earlier is None:
                self.fail(refusal)
            raise refusal
        if earlier is not None:
            earlier.end()

    def add(self, connection: Connection, chunk: pb.Chunk, payload: memoryview) -> None:
        """A chunk came. Raises what refuses it. A connection that was replaced is not heard any more."""
        with self._changed:
            if self._connection is not connection or self._failure is not None:
                return
            step = self._assembler.add(chunk, payload)
            if step is not None:
                self._steps.put(step)
                connection.answer(self._accepted())

    def goodbye(self) -> None:
        """The peer ends the link; steps that came before can still be received."""
        self._steps.put(LinkClosedError(f"stage {self.rank} closed the link"))

    def refused(self, error: HandoffError) -> None:
        """The peer found a fault and told us."""
        if self._end(error, None):
            self._on_failure(error)

    def lost(self, connection: Connection, reason: str) -> None:
        """`connection` ended. Waits for another one; without one the link fails."""
        with self._changed:
            if self._connection is not connection:
                return
            self._connection = None
            if self._changed.wait_for(
                lambda: self._connection is not None or self._failure is not None, self._settings.away_s
            ):
                return
        self.fail(PeerLostError(f"stage {self.rank} was away for more than {self._settings.away_s:g} s: {reason}"))

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _return_credit(self, step: Step) -> None:
        with self._changed:
            self._assembler.consume(step)
            due = self._assembler.unreported * REPORTS_PER_WINDOW >= self._settings.window_bytes
            if due and self._connection is not None:
                self._connection.answer(self._accepted())

    def _accepted(self) -> pb.AnswerHead:
        return pb.AnswerHead(accepted=self._assembler.accepted())

    def _end(self, error: HandoffError, last_word: pb.AnswerHead | None) -> bool:
        with self._changed:
            if self._failure is not None:
                return False
            self._failure = error
            connection = self._connection
            if connection is not None:
                if last_word is not None:
                    connection.answer(last_word)
                connection.end()
            self._changed.notify_all()
        self._steps.put(error)
        return True
