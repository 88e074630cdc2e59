"""The receiving end of all links of one worker: a gRPC server that authenticates peers and feeds their inboxes.

    stream of rank r --token, Hello--> inbox(r) <--Chunk...          inbox(r) --Accepted, Refusal--> stream

Two threads for each stream: gRPC's own writes answers (the handler is their generator), `handoff-in-R` reads frames.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import grpc

from pomarium.proto import handoff_pb2 as pb
from pomarium.worker.handoff.credentials import Tls, bind, check_plaintext, is_bearer
from pomarium.worker.handoff.errors import HandoffError, MalformedFrameError, as_refusal, from_refusal
from pomarium.worker.handoff.inbox import Inbox
from pomarium.worker.handoff.probe import PROBE, answer_probe
from pomarium.worker.handoff.reassembly import Reassembler
from pomarium.worker.handoff.settings import HandoffSettings
from pomarium.worker.handoff.tensors import Expected
from pomarium.worker.handoff.wire import decode_frame, encode

SERVICE = "pomarium.handoff.v1.Handoff"
LINK = "Link"
MAX_STREAMS = 8
"""Neighbours, their connections that are about to be replaced, and probes."""
STOP_S = 1.0
HELLO_S = 2.0
"""A stream that does not say who it is by then is ended."""

OnFailure = Callable[[int, HandoffError], None]
"""Called once for each link that fails, with the peer's rank, after all that waits for it has been failed."""


class HandoffServer:
    """Listens for the neighbours of one stage.

    Attributes:
        address: HOST:PORT with the port that was bound.
    """

    def __init__(
        self,
        bind_address: str,
        epoch: int,
        token: str,
        tls: Tls | None = None,
        settings: HandoffSettings | None = None,
        on_failure: OnFailure = lambda rank, error: None,
    ) -> None:
        """Listens at once.

        Args:
            bind_address: HOST:PORT; port 0 takes a free one.
            epoch: number of the plan; a peer of another one is refused.
            token: shared by all stages of the plan.

        Raises PlaintextRefusedError, CredentialsError or OSError.
        """
        self._settings = settings or HandoffSettings()
        check_plaintext(bind_address, tls, self._settings)
        self._epoch, self._token, self._on_failure = epoch, token, on_failure
        self._inboxes: dict[int, Inbox] = {}
        self._server = grpc.server(
            ThreadPoolExecutor(MAX_STREAMS, thread_name_prefix="handoff-out"), options=self._settings.server_options()
        )
        handlers = {
            LINK: grpc.stream_stream_rpc_method_handler(self._link, None, None),
            PROBE: grpc.stream_stream_rpc_method_handler(self._probe, None, None),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        port = bind(self._server, bind_address, tls)
        self.address = f"{bind_address.rpartition(':')[0]}:{port}"
        self._server.start()

    def inbox(self, peer_rank: int, expects: Mapping[str, Expected] | None = None) -> Inbox:
        """A new inbox for the peer, which is turned away until then. Raises ValueError if there is one already."""
        if peer_rank in self._inboxes:
            raise ValueError(f"there is an inbox for stage {peer_rank} already")
        assembler = Reassembler(self._epoch, self._settings, expects)
        made = Inbox(peer_rank, assembler, self._settings, lambda error: self._on_failure(peer_rank, error))
        self._inboxes[peer_rank] = made
        return made

    def fail(self, error: HandoffError) -> None:
        """Fail every link, telling the peers why: this stage cannot go on."""
        for inbox in self._inboxes.values():
            inbox.fail(error)

    def close(self) -> None:
        """Close every link and stop listening."""
        for inbox in self._inboxes.values():
            inbox.close()
        self._server.stop(STOP_S).wait(2 * STOP_S)

    def _link(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._authenticate(context)
        stream = _Stream()
        if not context.add_callback(stream.end):
            return
        inbox = self._admit(requests, stream, context)
        if inbox is not None:
            name = f"handoff-in-{inbox.rank}"
            threading.Thread(target=_read, args=(requests, stream, inbox), name=name, daemon=True).start()
        yield from stream.answers()

    def _probe(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        self._authenticate(context)
        yield from answer_probe(requests)

    def _authenticate(self, context: grpc.ServicerContext) -> None:
        if not is_bearer(context.invocation_metadata(), self._token):
            _abort(context, grpc.StatusCode.UNAUTHENTICATED, "this worker belongs to a plan with another token")

    def _admit(self, requests: Iterator[bytes], stream: "_Stream", context: grpc.ServicerContext) -> Inbox | None:
        """The inbox that the stream's Hello asks for; None if it was refused, which its answers say."""
        silence = threading.Timer(HELLO_S, context.cancel)
        silence.start()
        hello = _hello(requests, stream)
        silence.cancel()
        if hello is None:
            return None
        inbox = self._inboxes.get(hello.rank)
        if inbox is None:  # the peer was faster: it comes back
            _abort(context, grpc.StatusCode.UNAVAILABLE, f"this worker expects nothing from stage {hello.rank}")
        try:
            inbox.join(hello, stream)
        except HandoffError as error:
            stream.refuse(error)
            return None
        return inbox


class _Stream:
    """The answers of one connection."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[pb.AnswerHead | None] = queue.SimpleQueue()

    def answer(self, head: pb.AnswerHead) -> None:
        self._answers.put(head)

    def end(self) -> None:
        self._answers.put(None)

    def refuse(self, error: HandoffError) -> None:
        self.answer(pb.AnswerHead(refusal=as_refusal(error)))
        self.end()

    def answers(self) -> Iterator[bytes]:
        while (head := self._answers.get()) is not None:
            yield encode(head)


def _hello(requests: Iterator[bytes], stream: _Stream) -> pb.Hello | None:
    try:
        with contextlib.suppress(StopIteration, grpc.RpcError):  # gone before it said a word
            head, _ = decode_frame(next(requests))
            if head.WhichOneof("kind") != "hello":
                raise MalformedFrameError("a connection began without Hello")
            return head.hello
        stream.end()
    except HandoffError as error:
        stream.refuse(error)
    return None


def _read(requests: Iterator[bytes], stream: _Stream, inbox: Inbox) -> None:
    """Feeds `inbox` until the stream ends, then waits whether the peer comes back."""
    reason = "it ended the stream"
    try:
        for message in requests:
            head, payload = decode_frame(message)
            kind = head.WhichOneof("kind")
            if kind == "chunk":
                inbox.add(stream, head.chunk, payload)
            elif kind == "goodbye":
                inbox.goodbye()
                return
            elif kind == "refusal":
                inbox.refused(from_refusal(head.refusal))
                return
            else:
                raise MalformedFrameError(f"{kind} arrived within a connection")
    except HandoffError as error:
        inbox.fail(error)
        return
    except grpc.RpcError:
        reason = "the connection broke"
    finally:
        stream.end()
    inbox.lost(stream, reason)


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, details: str) -> NoReturn:
    context.abort(code, details)
    raise AssertionError("abort raises")
