"""Mutual TLS of the control stream, over real gRPC on loopback: who may drive a worker, and what others are told."""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import grpc
import pytest
from link_proxy import LinkProxy

from pomarium.cluster.executor.codec import WorkerLostError, encode, encode_call
from pomarium.cluster.executor.link import WorkerLink
from pomarium.cluster.executor.service import ControlService, serve
from pomarium.cluster.rack.identity import RackKey, read_tls, write_tls
from pomarium.proto import control_pb2 as pb
from pomarium.worker.handoff.credentials import Tls
from pomarium.worker.handoff.errors import CredentialsError, PlaintextRefusedError

TOKEN, WAIT_S, REFUSED_S = "a token", 10.0, 1.0


@dataclass(frozen=True)
class Macs:
    """Identities of two Macs of one rack, and of one of another."""

    worker: Tls
    engine: Tls
    stranger: Tls


@pytest.fixture(scope="module")
def macs(tmp_path_factory: pytest.TempPathFactory) -> Macs:
    ours, theirs = RackKey.generate(), RackKey.generate()
    return Macs(*(issued(tmp_path_factory.mktemp("tls"), key) for key in (ours, ours, theirs)))


def issued(folder: Path, key: RackKey) -> Tls:
    write_tls(key, folder)
    return read_tls(folder)


@dataclass
class Worker:
    """A service, the end of its engine, and the links to it."""

    service: ControlService
    server: grpc.Server
    address: str
    ended: threading.Event
    links: list[WorkerLink] = field(default_factory=list)

    def link(self, tls: Tls | None, token: str = TOKEN) -> WorkerLink:
        made = WorkerLink("worker 0", self.address, token, lambda error: None, tls)
        self.links.append(made)
        return made


def worker(tls: Tls | None) -> Worker:
    ended = threading.Event()
    service = ControlService(TOKEN, ended.set)
    return Worker(service, *serve(service, "127.0.0.1", tls), ended)


@pytest.fixture
def served(macs: Macs) -> Iterator[Worker]:
    made = worker(macs.worker)
    yield made
    for link in made.links:
        link.close()
    made.server.stop(0)


def is_served(link: WorkerLink, peer: Worker) -> bool:
    link.wait_ready(WAIT_S)
    reply = link.call("echo", encode_call("echo"), WAIT_S)
    call = peer.service.calls.get(timeout=WAIT_S)
    peer.service.report(pb.Report(result=pb.Result(seq=call.seq, payload=encode("an answer"))))
    return bool(reply.result() == "an answer")


def test_two_macs_of_one_rack_find_each_other(served: Worker, macs: Macs) -> None:
    assert is_served(served.link(macs.engine), served)


def test_the_certificate_does_not_replace_the_token(served: Worker, macs: Macs) -> None:
    with pytest.raises(WorkerLostError, match="UNAUTHENTICATED"):
        served.link(macs.engine, "another token").wait_ready(WAIT_S)


def test_a_worker_of_another_rack_is_not_trusted(served: Worker, macs: Macs) -> None:
    """The engine must not hand it its token."""
    check_refused(
        served, macs.stranger, CredentialsError, r"worker 0 cannot be trusted: .* another rack: .* rack key\.$"
    )


def test_an_engine_of_another_rack_is_refused(served: Worker, macs: Macs) -> None:
    """It knows whom to expect, but its own certificate is another authority's."""
    intruder = replace(macs.stranger, authority=macs.engine.authority)
    check_refused(served, intruder, WorkerLostError, "closed the connection before it answered: .*POMARIUM_TLS")


def test_an_engine_without_a_certificate_is_refused(served: Worker) -> None:
    check_refused(served, None, WorkerLostError, "closed the connection before it answered: .*POMARIUM_TLS")


def test_a_worker_without_tls_is_not_trusted(macs: Macs) -> None:
    plain = worker(None)
    try:
        check_refused(
            plain, macs.engine, CredentialsError, "does not use TLS .* set POMARIUM_TLS on both or on neither"
        )
    finally:
        plain.server.stop(0)


def check_refused(peer: Worker, tls: Tls | None, error: type[Exception], says: str) -> None:
    started = time.monotonic()
    link = peer.link(tls)
    with pytest.raises(error, match=says):
        link.wait_ready(WAIT_S)
    assert time.monotonic() - started < REFUSED_S
    link.close()
    assert not peer.ended.is_set(), "a stranger must not be able to end the worker"
    assert peer.service.calls.empty()


def test_refused_strangers_do_not_disturb_the_engine(served: Worker, macs: Macs) -> None:
    link = served.link(macs.engine)
    link.wait_ready(WAIT_S)
    for tls in (None, macs.stranger):
        check_refused(served, tls, Exception, "worker 0")
    assert is_served(link, served)


@pytest.mark.parametrize("encrypted", [True, False])
def test_what_passes_is_readable_only_without_tls(macs: Macs, encrypted: bool) -> None:
    """Of the stream: what is sent over the wire is sealed in either case, and its key comes over the stream."""
    served, passed = worker(macs.worker if encrypted else None), bytearray()
    proxy = LinkProxy(served.address)
    proxy.alter = lambda data: (passed.extend(data), data)[1]
    link = WorkerLink("worker 0", proxy.address, TOKEN, lambda error: None, macs.engine if encrypted else None)
    link.wait_ready(WAIT_S)
    link.post("step", encode_call("step"))
    assert served.service.calls.get(timeout=WAIT_S).method == "step"
    link.close()
    proxy.close()
    served.server.stop(0)
    assert (TOKEN.encode() in passed) is not encrypted


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "2001:db8::1"])
def test_plain_text_beyond_loopback_is_refused_at_start(host: str) -> None:
    with pytest.raises(PlaintextRefusedError, match=r"POMARIUM_TLS.*POMARIUM_ALLOW_PLAINTEXT=1"):
        serve(ControlService(TOKEN, lambda: None), host)
    address = f"[{host}]:7" if ":" in host else f"{host}:7"
    with pytest.raises(PlaintextRefusedError, match="in plain text"):
        WorkerLink("worker 0", address, TOKEN, lambda error: None)


def test_plain_text_may_be_allowed() -> None:
    ended = threading.Event()
    service = ControlService(TOKEN, ended.set)
    server, address = serve(service, "0.0.0.0", allow_plaintext=True)
    link = WorkerLink("worker 0", address, TOKEN, lambda error: None, allow_plaintext=True)
    assert is_served(link, Worker(service, server, address, ended))
    link.close()
    server.stop(0)


def test_tls_may_leave_loopback(macs: Macs) -> None:
    ended = threading.Event()
    service = ControlService(TOKEN, ended.set)
    server, address = serve(service, "0.0.0.0", macs.worker)
    link = WorkerLink("worker 0", address, TOKEN, lambda error: None, macs.engine)
    assert is_served(link, Worker(service, server, address, ended))
    link.close()
    server.stop(0)


def test_a_certificate_with_another_key_is_refused_at_start(macs: Macs) -> None:
    with pytest.raises(CredentialsError, match="cannot be used"):
        serve(ControlService(TOKEN, lambda: None), "127.0.0.1", replace(macs.worker, key=macs.stranger.key))
