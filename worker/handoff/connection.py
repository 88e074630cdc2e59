"""One connection of a link, from the sender's side: a gRPC stream that is opened, talked over, and ends.

source() --frames--> gRPC's writing thread --> peer          peer --> answers --on_answer--> the thread of `run`
ring(): there may be frames.   hang_up(word): no more, and this is the last.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker import local_network
from pomarium.worker.handoff.credentials import Tls, bearer, open_channel
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.wire import encode

PATH = "/pomarium.handoff.v1.Handoff/Link"
LAST_WORD_S = 0.5
"""How long a last word may take to arrive and be answered by the end of the stream."""
_PERMANENT = frozenset(
    {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNIMPLEMENTED}
)


@dataclass(frozen=True)
class Peer:
    """Where a connection goes and how it proves itself."""

    address: str
    token: str
    tls: Tls | None


@dataclass(frozen=True)
class Ended:
    """How a connection ended.

    Attributes:
        permanent: the peer's server turned it away; another attempt would fare no better.
    """

    reason: str
    permanent: bool = False


class Connection:
    """A stream to `peer` that begins with `hello`.

    Args:
        source: gives the next frame or None if there is none now; called on gRPC's thread.
    """

    def __init__(
        self,
        peer: Peer,
        settings: HandoffSettings,
        hello: pb.Hello,
        source: Callable[["Connection"], bytes | None],
    ) -> None:
        self._peer, self._settings, self._hello, self._source = peer, settings, hello, source
        self._bell: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._last_word: pb.FrameHead | None = None
        self._hung_up = threading.Event()
        self._call: grpc.RpcContext | None = None

    def run(self, on_answer: Callable[[bytes], None]) -> Ended:
        """Opens the stream and hands on answers until it ends. The first must come within `attempt_s`."""
        with open_channel(self._peer.address, self._peer.tls, self._settings.client_options()) as channel:
            call = channel.stream_stream(PATH, None, None)(self._frames(), metadata=bearer(self._peer.token))
            self._call = call
            silence = _after(self._settings.attempt_s, call)
            try:
                for message in call:
                    silence.cancel()
                    on_answer(message)
                return Ended("it ended the stream")
            except grpc.RpcError as error:
                said = local_network.explained(f"{error.code().name}: {error.details()}", self._peer.address)
                return Ended(said, error.code() in _PERMANENT)
            finally:
                silence.cancel()
                self._bell.put(False)  # frees gRPC's thread

    def ring(self) -> None:
        """The source may have frames."""
        self._bell.put(True)

    def hang_up(self, last_word: pb.FrameHead | None) -> None:
        """Send `last_word`, if any, instead of further frames, and end the stream soon whatever the peer does."""
        self._last_word = last_word
        self._hung_up.set()
        self._bell.put(False)
        if self._call is not None:
            _after(LAST_WORD_S, self._call)

    def _frames(self) -> Iterator[bytes]:
        yield encode(pb.FrameHead(hello=self._hello))
        while self._bell.get() and not self._hung_up.is_set():
            while not self._hung_up.is_set() and (frame := self._source(self)) is not None:
                yield frame
        if self._last_word is not None:
            yield encode(self._last_word)


def _after(seconds: float, call: grpc.RpcContext) -> threading.Timer:
    timer = threading.Timer(seconds, call.cancel)
    timer.daemon = True
    timer.start()
    return timer
