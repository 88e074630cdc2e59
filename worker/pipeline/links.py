"""The links of one stage to its neighbours, opened in two steps because each needs the others' addresses.

    listen(place) --address--> executor --addresses of all stages--> connect(addresses)

    stage r-1 --"hidden" (T, hidden_size)--> stage r --"hidden"--> stage r+1      once per step that has rows
    last stage --"tokens" int32 (R,)--> stage 0                                   once per step that samples R >= 1 rows

Steps are counted here, at each end for itself: every stage executes the same steps in the same order.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from pomarium.worker.address import authority
from pomarium.worker.handoff.credentials import plaintext_allowed, tls_of
from pomarium.worker.handoff.errors import HandoffError
from pomarium.worker.handoff.inbox import Inbox
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import Expected
from pomarium.worker.pipeline.place import StagePlace
from pomarium.worker.settings import step_timeout

HIDDEN, TOKENS = "hidden", "tokens"

PATIENCE = 0.8
"""Share of the time that a step may take, if that is bound at all, for which a stage waits for a neighbour that is
alive: its error, which names the link, comes before the engine's. A lost or frozen one is seen within seconds."""
CONNECT_TIMEOUT_S = 20.0

OnFailure = Callable[[HandoffError], None]


class StageLinks:
    """What one stage receives and hands on. All methods but the constructor belong to the thread that runs the steps.

    Attributes:
        address: where the other stages reach this one.
        step: number of the step that is being computed, -1 before the first.
        waited_s, handing_s: seconds spent so far waiting for neighbours, and handing on.
    """

    def __init__(
        self,
        place: StagePlace,
        received: Expected | None,
        on_failure: OnFailure,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        """Listens at once.

        Args:
            received: the hidden states that come from the stage before; None on the first stage.
            on_failure: told once, from a thread of a link, when one has failed for good.

        Raises:
            PlaintextRefusedError, CredentialsError or OSError.
        """
        self._place, self._on_failure = place, on_failure
        limit_s = step_timeout(environ)
        self._patience_s = None if limit_s is None else PATIENCE * limit_s
        self._tls = tls_of(environ)
        self._settings = HandoffSettings(allow_plaintext=plaintext_allowed(environ))
        self._server = HandoffServer(
            authority(place.host, 0),
            place.epoch,
            place.token,
            self._tls,
            self._settings,
            lambda rank, error: on_failure(error),
        )
        self.address = self._server.address
        self.step = -1
        self.waited_s = self.handing_s = 0.0
        self._next: Outbox | None = None
        self._first: Outbox | None = None
        self._before: Inbox | None = None
        self._last: Inbox | None = None
        if received is not None:
            self._before = self._server.inbox(place.rank - 1, {HIDDEN: received})
        if place.is_first:
            self._last = self._server.inbox(place.last, {TOKENS: Expected(mx.int32, (None,))})

    def connect(self, addresses: Sequence[str]) -> None:
        """Open the links to the stages that this one hands something to. `addresses` in rank order.

        Raises:
            HandoffError: a neighbour is not reached within CONNECT_TIMEOUT_S, or refuses.
        """
        if self._place.is_last:
            self._first = self._outbox(addresses[0])
        else:
            self._next = self._outbox(addresses[self._place.rank + 1])

    def begin_step(self) -> int:
        """Count one more step that has rows; returns its number, from 0."""
        self.step += 1
        return self.step

    def receive_hidden(self) -> mx.array:
        """Hidden states (T, hidden_size) of this step from the stage before. Raises HandoffError."""
        assert self._before is not None
        return self._received(self._before, HIDDEN, self.step)

    def receive_tokens(self, step: int) -> list[int]:
        """The sampled tokens of an earlier step, in the order of its samplers. Raises HandoffError."""
        assert self._last is not None
        return [int(token) for token in np.array(self._received(self._last, TOKENS, step))]

    def hand_on(self, hidden: mx.array) -> None:
        """Queue hidden states (T, hidden_size) of this step, evaluated, for the next stage. Raises HandoffError."""
        assert self._next is not None
        self._send(self._next, {HIDDEN: hidden})

    def return_tokens(self, token_ids: Sequence[int]) -> None:
        """Queue the sampled tokens of this step for the first stage. Raises HandoffError."""
        assert self._first is not None
        self._send(self._first, {TOKENS: mx.array(np.array(token_ids, np.int32))})

    def close(self) -> None:
        """End the links without a fault."""
        for outbox in (self._next, self._first):
            if outbox is not None:
                outbox.close()
        self._server.close()

    def _received(self, inbox: Inbox, name: str, step: int) -> mx.array:
        began = time.perf_counter()
        array = inbox.receive(step, self._patience_s)[name]
        self.waited_s += time.perf_counter() - began
        return array

    def _send(self, outbox: Outbox, arrays: Mapping[str, mx.array]) -> None:
        began = time.perf_counter()
        outbox.send(self.step, arrays, self._patience_s)
        self.handing_s += time.perf_counter() - began

    def _outbox(self, address: str) -> Outbox:
        place = self._place
        return Outbox.connect(
            address,
            place.rank,
            place.epoch,
            place.token,
            self._tls,
            self._settings,
            self._on_failure,
            CONNECT_TIMEOUT_S,
        )
