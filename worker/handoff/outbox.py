"""What this stage hands to one neighbour: the sending end of a link.

    stage loop --send--> SendWindow --frames--> Connection --> peer's inbox
                                    <-answers--             `handoff-HOST:PORT`, the thread that also reconnects

`send` evaluates the arrays, waits for credit, and returns: framing, checksums and sending go on beside the next step's
compute. A connection that breaks is opened again, and what was not accepted is sent again; a link without
progress over `away_s` of that has failed.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping

import mlx.core as mx

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.connection import LAST_WORD_S, Connection, Ended, Peer
from pomarium.worker.handoff.credentials import Tls, check_plaintext
from pomarium.worker.handoff.errors import (
    HandoffError,
    HandoffTimeoutError,
    LinkClosedError,
    PeerLostError,
    PeerRefusedError,
    as_refusal,
    from_refusal,
)
from pomarium.worker.handoff.patience import Patience
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import pack
from pomarium.worker.handoff.window import SendWindow
from pomarium.worker.handoff.wire import decode_answer, encode


class Outbox:
    """Steps to one peer. Made by `connect`; `send` belongs to one thread, everything else to any.

    Attributes:
        address: the peer's HandoffServer, HOST:PORT.
    """

    def __init__(
        self, peer: Peer, hello: pb.Hello, settings: HandoffSettings, on_failure: Callable[[HandoffError], None]
    ) -> None:
        self.address = peer.address
        self._peer, self._hello, self._settings, self._on_failure = peer, hello, settings, on_failure
        self._changed = threading.Condition()
        self._window = SendWindow(hello.epoch, settings)
        self._patience = Patience(settings)
        self._connection: Connection | None = None
        self._joined = False
        self._last_end = "no answer"
        self._failure: HandoffError | None = None
        self._thread = threading.Thread(target=self._run, name=f"handoff-{peer.address}", daemon=True)

    @classmethod
    def connect(
        cls,
        address: str,
        rank: int,
        epoch: int,
        token: str,
        tls: Tls | None = None,
        settings: HandoffSettings | None = None,
        on_failure: Callable[[HandoffError], None] = lambda error: None,
        timeout_s: float = 30.0,
    ) -> "Outbox":
        """A link to the HandoffServer at `address`, whose inbox for `rank` (ours) has accepted it.

        Args:
            epoch, token: of the plan.
            on_failure: called once if the link fails later, after all that waits for it has been failed.

        Raises PlaintextRefusedError, PeerLostError after `timeout_s`, or what the peer refused with.
        """
        settings = settings or HandoffSettings()
        check_plaintext(address, tls, settings)
        hello = pb.Hello(epoch=epoch, rank=rank, session=os.urandom(16), window_bytes=settings.window_bytes)
        outbox = cls(Peer(address, token, tls), hello, settings, on_failure)
        outbox._begin(timeout_s)
        return outbox

    def send(self, step: int, arrays: Mapping[str, mx.array], timeout_s: float | None = 30.0) -> None:
        """Queue the tensors of a step.

        Raises HandoffTimeoutError if there is no credit in time (nothing was queued then), what the link failed with,
        StepError if steps do not grow, TensorError for arrays that cannot be handed on.
        """
        tensors = pack(arrays)
        with self._changed:
            credit = self._changed.wait_for(lambda: self._window.admits or self._failure is not None, timeout_s)
            if self._failure is not None:
                raise self._failure
            if not credit:
                raise HandoffTimeoutError(
                    f"step {step} was not sent to {self.address} in {timeout_s:g} s: "
                    f"{self._window.in_flight} bytes wait for the receiving stage"
                )
            self._window.offer(step, tensors)
            connection = self._connection
        if connection is not None:
            connection.ring()

    def fail(self, error: HandoffError) -> None:
        """Fail the link, tell the peer why, and call `on_failure`; only the first time counts."""
        self._fail(error, pb.FrameHead(refusal=as_refusal(error)))

    def flush(self, timeout_s: float) -> bool:
        """Waits until the peer has all that was sent; whether it has. Raises what the link failed with."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._failure is not None or self._window.is_empty, timeout_s)
            if self._failure is not None:
                raise self._failure
            return done

    def close(self, timeout_s: float = 5.0) -> None:
        """End the link without a fault, after the peer has all that was sent or `timeout_s` is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._window.is_empty, timeout_s)
        self._end(LinkClosedError(f"the link to {self.address} was closed"), pb.FrameHead(goodbye=pb.Goodbye()))
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * LAST_WORD_S)

    def _begin(self, timeout_s: float) -> None:
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._joined or self._failure is not None, timeout_s)
            joined = self._joined
        if not joined:
            self._end(PeerLostError(f"{self.address} was not reached in {timeout_s:g} s: {self._last_end}"), None)
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while self._failure is None:
            ended = self._converse()
            pause_s = self._after(ended)
            with self._changed:
                self._changed.wait_for(lambda: self._failure is not None, pause_s)

    def _converse(self) -> Ended:
        connection = Connection(self._peer, self._settings, self._hello, self._next_frame)
        ended = connection.run(lambda answer: self._on_answer(connection, answer))
        with self._changed:
            self._connection = None
            self._window.suspend()
        return ended

    def _after(self, ended: Ended) -> float:
        """Seconds to pause after a connection, or the failure of the link."""
        self._last_end = ended.reason
        if ended.permanent:
            self._fail(PeerRefusedError(f"{self.address} refused the connection: {ended.reason}"), None)
        if not self._joined:  # `connect` waits and has a deadline of its own
            return self._settings.max_pause_s / 5
        pause_s = self._patience.lost(time.monotonic())
        if pause_s is None:
            away_s = self._settings.away_s
            self._fail(PeerLostError(f"{self.address} was away for more than {away_s:g} s: {ended.reason}"), None)
        return pause_s or 0.0

    def _next_frame(self, connection: Connection) -> bytes | None:
        with self._changed:
            piece = self._window.next_piece() if self._connection is connection else None
        return None if piece is None else encode(pb.FrameHead(chunk=piece.chunk), piece.payload)

    def _on_answer(self, connection: Connection, message: bytes) -> None:
        try:
            answer = decode_answer(message)
            if answer.WhichOneof("kind") == "accepted":
                self._on_accepted(connection, answer.accepted)
                return
        except HandoffError as error:
            self.fail(error)
            return
        if answer.WhichOneof("kind") == "refusal":
            self._fail(from_refusal(answer.refusal), None)
        else:
            self._end(LinkClosedError(f"{self.address} closed the link"), None)

    def _on_accepted(self, connection: Connection, accepted: pb.Accepted) -> None:
        with self._changed:
            if self._failure is not None:
                return
            before = self._window.first_seq
            if self._connection is connection:
                self._window.accepted(accepted)
            else:  # the answer to Hello
                self._connection = connection
                self._window.resume(accepted)
                self._joined = True
                connection.ring()
            if self._window.first_seq > before or self._window.is_empty:
                self._patience.progress()
            self._changed.notify_all()

    def _fail(self, error: HandoffError, last_word: pb.FrameHead | None) -> None:
        if self._end(error, last_word) and self._joined:
            self._on_failure(error)

    def _end(self, error: HandoffError, last_word: pb.FrameHead | None) -> bool:
        """Whether this is what the link ended with."""
        with self._changed:
            if self._failure is not None:
                return False
            self._failure = error
            connection = self._connection
            self._changed.notify_all()
        if connection is not None:
            connection.hang_up(last_word)
        return True
