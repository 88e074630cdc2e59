"""Both ends of a link between stages, over real gRPC on loopback, and tensors to send.

Ends: a receiving HandoffServer, its Inbox --outbox, proxy--> sending ends, straight or through a LinkProxy
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from link_proxy import LinkProxy

from pomarium.worker.handoff.credentials import Tls
from pomarium.worker.handoff.errors import HandoffError
from pomarium.worker.handoff.inbox import Inbox
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.server import HandoffServer
from pomarium.worker.handoff.settings import HandoffSettings

EPOCH, TOKEN, WAIT_S = 3, "a token", 10.0
FAST = HandoffSettings(chunk_bytes=64 << 10, ping_interval_s=1.0, ping_timeout_s=1.0, attempt_s=0.5, away_s=0.6)


@dataclass
class Ends:
    """A receiving server, and what both ends were told."""

    settings: HandoffSettings = FAST
    tls: Tls | None = None
    at_receiver: "Future[HandoffError]" = field(default_factory=Future)
    at_sender: "Future[HandoffError]" = field(default_factory=Future)

    def __post_init__(self) -> None:
        self._opened: list[Callable[[], None]] = []
        self.server = HandoffServer(
            "127.0.0.1:0", EPOCH, TOKEN, self.tls, self.settings, lambda _, error: self.at_receiver.set_result(error)
        )
        self.inbox: Inbox = self.server.inbox(0)

    def outbox(self, address: str | None = None, timeout_s: float = WAIT_S) -> Outbox:
        made = Outbox.connect(
            address or self.server.address,
            0,
            EPOCH,
            TOKEN,
            self.tls,
            self.settings,
            self.at_sender.set_result,
            timeout_s,
        )
        self._opened.append(lambda: made.close(0.0))
        return made

    def proxy(self) -> LinkProxy:
        made = LinkProxy(self.server.address)
        self._opened.append(made.close)
        return made

    def close(self) -> None:
        for close in reversed(self._opened):
            close()
        self.server.close()


def hidden(step: int, nbytes: int = 64) -> dict[str, mx.array]:
    """bf16 rows that differ from step to step."""
    words = (np.arange(nbytes // 2, dtype=np.uint32) * 2654435761 + step).astype(np.uint16)
    return {"hidden": mx.array(words).view(mx.bfloat16), "positions": mx.array([step], mx.int32)}


def is_equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    assert list(one) == list(other)
    return all(
        a.dtype == b.dtype and bytes(memoryview(a)) == bytes(memoryview(b))
        for a, b in zip(one.values(), other.values(), strict=True)
    )
