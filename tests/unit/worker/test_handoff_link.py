"""Links over real gRPC on loopback: steps, credit, resumption, altered bytes, ends."""

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from handoff_ends import EPOCH, FAST, TOKEN, WAIT_S, Ends, hidden, is_equal
from recording_proxy import proxied

from pomarium.worker.handoff.errors import (
    ChecksumError,
    HandoffError,
    HandoffTimeoutError,
    LinkClosedError,
    PeerLostError,
    StepError,
)
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.server import HandoffServer


@pytest.fixture
def ends() -> Iterator[Ends]:
    with closing(Ends()) as made:
        yield made


@pytest.fixture
def patient() -> Iterator[Ends]:
    """Ends whose path may be broken for as long as a busy machine takes to mend it."""
    with closing(Ends(replace(FAST, away_s=30.0))) as made:
        yield made


def test_no_proxy_of_the_environment_comes_between(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxied(monkeypatch) as proxy:
        ends.outbox().send(0, hidden(0))
        assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))
    assert proxy.asked == []


def test_steps_come_out_as_they_went_in(ends: Ends) -> None:
    outbox = ends.outbox()
    for step, nbytes in enumerate((2, 1 << 10, 64 << 10, (64 << 10) + 2, 1 << 20, 32 << 20)):
        outbox.send(step, hidden(step, nbytes))
        assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, nbytes))


def test_a_ring_of_two_stages(ends: Ends) -> None:
    """Hidden states go on, token ids come back, for each step; each stage loop on a thread of its own."""
    back = HandoffServer("127.0.0.1:0", EPOCH, TOKEN)
    tokens = back.inbox(1)

    def last_stage() -> int:
        outbox = Outbox.connect(back.address, 1, EPOCH, TOKEN)
        for step in range(100):
            tensors = ends.inbox.receive(step, WAIT_S)
            out = {"tokens": tensors["positions"] * 2}
            outbox.send(step, out)
        outbox.close()
        return 100

    done: Future[int] = Future()
    threading.Thread(target=lambda: done.set_result(last_stage()), daemon=True).start()
    outbox = ends.outbox()
    for step in range(100):
        outbox.send(step, hidden(step, 1 << 12))
        assert tokens.receive(step, WAIT_S)["tokens"].tolist() == [2 * step]
    assert done.result(WAIT_S) == 100
    with pytest.raises(LinkClosedError, match="stage 1 closed the link"):
        tokens.receive(100, WAIT_S)
    back.close()


def test_sending_does_not_wait_for_the_link(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    proxy.bytes_per_s = 4e6
    start = time.monotonic()
    for step in range(4):
        outbox.send(step, hidden(step, 500_000))
    sent_s = time.monotonic() - start
    assert [is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 500_000)) for step in range(4)] == [True] * 4
    assert time.monotonic() - start > max(0.4, 2 * sent_s)


def test_a_slow_receiver_slows_the_sender() -> None:
    ends = Ends(replace(FAST, window_bytes=1 << 20))
    try:
        outbox = ends.outbox()
        sent = 0
        with pytest.raises(HandoffTimeoutError, match=r"was not sent to .* in 0\.3 s: \d+ bytes wait"):  # noqa: PT012
            for sent in range(1000):
                outbox.send(sent, hidden(sent, 300_000), timeout_s=0.3)
        assert sent == 4, "a window and one step at most"
        waiting: Future[float] = Future()

        def send_on() -> None:
            outbox.send(sent, hidden(sent, 300_000), WAIT_S)
            waiting.set_result(time.monotonic())

        threading.Thread(target=send_on, daemon=True).start()
        time.sleep(0.1)
        assert not waiting.done()
        for step in range(sent + 1):
            assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 300_000))
        waiting.result(WAIT_S)
        for step in range(sent + 1, 60):  # credit goes on coming back
            outbox.send(step, hidden(step, 300_000), WAIT_S)
            ends.inbox.receive(step, WAIT_S)
    finally:
        ends.close()


def test_receive_has_a_deadline_and_the_link_goes_on(ends: Ends) -> None:
    outbox = ends.outbox()
    with pytest.raises(HandoffTimeoutError, match=r"step 0 did not come from stage 0 in 0\.05 s"):
        ends.inbox.receive(0, 0.05)
    outbox.send(0, hidden(0))
    assert is_equal(ends.inbox.receive(0, WAIT_S), hidden(0))


def test_another_step_than_asked_for_fails_both_ends(ends: Ends) -> None:
    ends.outbox().send(4, hidden(4))
    with pytest.raises(StepError, match="step 4 came from stage 0 where step 3 was due"):
        ends.inbox.receive(3, WAIT_S)
    assert isinstance(ends.at_sender.result(WAIT_S), StepError)
    assert isinstance(ends.at_receiver.result(WAIT_S), StepError)


@pytest.mark.parametrize("seed", [1, 2])
def test_cut_connections_lose_and_double_nothing(patient: Ends, seed: int) -> None:
    random = np.random.default_rng(seed)
    proxy = patient.proxy()
    outbox = patient.outbox(proxy.address)
    for first in range(0, 30, 3):  # three steps under way each time
        proxy.cut_after(int(random.integers(1, 400_000)))
        for step in range(first, first + 3):
            outbox.send(step, hidden(step, 150_000))
        for step in range(first, first + 3):
            assert is_equal(patient.inbox.receive(step, WAIT_S), hidden(step, 150_000))
    assert proxy.connections > 10
    assert not patient.at_sender.done()
    assert not patient.at_receiver.done()


def test_an_outage_shorter_than_the_deadline_is_bridged(patient: Ends) -> None:
    proxy = patient.proxy()
    outbox = patient.outbox(proxy.address)
    proxy.refusing = True
    proxy.cut()
    outbox.send(0, hidden(0))
    time.sleep(0.3)
    proxy.refusing = False
    assert is_equal(patient.inbox.receive(0, WAIT_S), hidden(0))


@pytest.mark.parametrize("how", ["refused", "held"])
def test_a_longer_one_fails_everything_that_waits(how: str) -> None:
    """refused: connections are closed at once. held: nothing comes through, as when a cable is pulled out."""
    ends = Ends(replace(FAST, window_bytes=1))
    try:
        proxy = ends.proxy()
        outbox = ends.outbox(proxy.address)
        waiting: dict[str, Future[float]] = {"send": Future(), "receive": Future()}

        def wait(name: str, call: Callable[[], object]) -> None:
            try:
                call()
            except PeerLostError:
                waiting[name].set_result(time.monotonic())

        start = time.monotonic()
        if how == "held":
            proxy.hold()
        else:
            proxy.refusing = True
            proxy.cut()
        outbox.send(0, hidden(0))  # queued; the next has to wait for credit
        for name, call in (
            ("send", lambda: outbox.send(1, hidden(1), 60)),
            ("receive", lambda: ends.inbox.receive(0, 60)),
        ):
            threading.Thread(target=wait, args=(name, call), daemon=True).start()
        for future in waiting.values():
            assert future.result(WAIT_S) - start < 5.0
        for told in (ends.at_sender, ends.at_receiver):
            assert "away for more than 0.6 s" in str(told.result(1))
    finally:
        ends.close()


def test_a_path_that_always_breaks_again_is_given_up(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)

    def breaks(data: bytes) -> bytes:
        if len(data) > 4000:  # Hello passes, a chunk never does
            proxy.cut()
        return data

    proxy.alter = breaks
    outbox.send(0, hidden(0, 60_000))
    assert isinstance(ends.at_sender.result(WAIT_S), PeerLostError)
    assert isinstance(ends.at_receiver.result(WAIT_S), PeerLostError)


def test_an_altered_payload_is_refused_at_both_ends(ends: Ends) -> None:
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)
    proxy.alter = lambda data: data.replace(b"\xab" * 64, b"\xab" * 63 + b"\xaa", 1)
    outbox.send(0, {"a": mx.full((1 << 14,), -1414812757, mx.int32)})  # 0xABABABAB
    with pytest.raises(ChecksumError, match="arrived altered"):
        ends.inbox.receive(0, WAIT_S)
    assert isinstance(ends.at_sender.result(WAIT_S), ChecksumError)
    with pytest.raises(ChecksumError):
        outbox.send(1, hidden(1))


def test_noise_on_the_path_gives_the_sent_steps_or_a_reason(ends: Ends) -> None:
    """Any byte of HTTP/2 may change: the connection is resumed, or the link refused; never other values."""
    random = np.random.default_rng(0)
    proxy = ends.proxy()
    outbox = ends.outbox(proxy.address)

    def noise(data: bytes) -> bytes:
        if random.random() > 0.1:
            return data
        place = int(random.integers(len(data)))
        return data[:place] + bytes([data[place] ^ int(random.integers(1, 256))]) + data[place + 1 :]

    proxy.alter = noise
    try:
        for step in range(40):
            outbox.send(step, hidden(step, 40_000), WAIT_S)
            assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 40_000))
    except HandoffError as error:
        assert not isinstance(error, HandoffTimeoutError)  # noqa: PT017


# --- ends of links --------------------------------------------------------------------------------------------------


def test_what_was_sent_before_the_end_still_arrives(ends: Ends) -> None:
    outbox = ends.outbox()
    for step in range(3):
        outbox.send(step, hidden(step, 200_000))
    assert outbox.flush(WAIT_S)
    outbox.send(3, hidden(3))
    outbox.close()
    for step in range(3):
        assert is_equal(ends.inbox.receive(step, WAIT_S), hidden(step, 200_000))
    assert is_equal(ends.inbox.receive(3, WAIT_S), hidden(3))
    for _ in range(2):
        with pytest.raises(LinkClosedError, match="stage 0 closed the link"):
            ends.inbox.receive(4, WAIT_S)
    with pytest.raises(LinkClosedError):
        outbox.send(4, hidden(4))
    assert not ends.at_receiver.done()
    assert not ends.at_sender.done()


def test_a_receiver_that_closes_tells_its_sender(ends: Ends) -> None:
    outbox = ends.outbox()
    ends.server.close()
    with pytest.raises(LinkClosedError):  # noqa: PT012 - from the first after it was told
        for step in itertools.count():
            outbox.send(step, hidden(step))
            time.sleep(0.01)
    assert not ends.at_sender.done(), "an orderly end is no failure"


@pytest.mark.parametrize("finder", ["sender", "receiver"])
def test_the_failure_of_a_stage_reaches_its_neighbour(ends: Ends, finder: str) -> None:
    outbox = ends.outbox()
    error = HandoffError("stage failed: ValueError: broken")
    start = time.monotonic()
    (outbox if finder == "sender" else ends.server).fail(error)
    for told in (ends.at_sender, ends.at_receiver):
        assert str(told.result(WAIT_S)) == str(error)
    assert time.monotonic() - start < 1
    with pytest.raises(HandoffError, match="broken"):
        outbox.send(0, hidden(0))
    with pytest.raises(HandoffError, match="broken"):
        ends.inbox.receive(0, WAIT_S)


def test_a_process_with_links_can_exit(tmp_path: Path) -> None:
    script = tmp_path / "link.py"
    script.write_text(
        "import mlx.core as mx\n"
        "from pomarium.worker.handoff.outbox import Outbox\n"
        "from pomarium.worker.handoff.server import HandoffServer\n"
        "server = HandoffServer('127.0.0.1:0', 1, 't')\n"
        "inbox = server.inbox(0)\n"
        "outbox = Outbox.connect(server.address, 0, 1, 't')\n"
        "outbox.send(0, {'a': mx.array([7])})\n"
        "assert inbox.receive(0, 10)['a'].tolist() == [7]\n"
        "outbox.close()\n"
        "server.close()\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=30)
