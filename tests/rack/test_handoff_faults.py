"""Two stages in two processes, one of which is killed or frozen: the other's links fail within seconds."""

import os
import queue
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

WAIT_S = 20.0

pytestmark = pytest.mark.e2e

PRELUDE = """
import sys, time
import mlx.core as mx
from pomarium.worker.handoff.errors import HandoffError
from pomarium.worker.handoff.outbox import Outbox
from pomarium.worker.handoff.server import HandoffServer

def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")  # in one piece: several threads speak
    sys.stdout.flush()

def failed(*told):
    say("told", time.time(), type(told[-1]).__name__, told[-1])

server = HandoffServer("127.0.0.1:0", 1, "token", on_failure=failed)
inbox = server.inbox(0)
say("address", server.address)

def until_it_raises(what, call):
    try:
        while True:
            call()
    except HandoffError as error:
        say(what, time.time(), type(error).__name__, error)
"""

STAGE = (
    PRELUDE
    + """
peer = sys.stdin.readline().strip()
outbox = Outbox.connect(peer, 0, 1, "token", on_failure=failed)
steps = iter(range(1 << 40))

def loop():
    step = next(steps)
    outbox.send(step, {"hidden": mx.zeros((16, 1024), mx.bfloat16)}, 60)
    assert inbox.receive(step, 60)["hidden"].shape == (16, 1024)
    if step == 20:
        say("running", time.time())

until_it_raises("ended", loop)
say("done", time.time())
sys.stdin.readline()
"""
)

SENDER = (
    PRELUDE
    + """
peer = sys.stdin.readline().strip()
outbox = Outbox.connect(peer, 0, 1, "token", on_failure=failed)
steps = iter(range(1 << 40))

def loop():
    step = next(steps)
    outbox.send(step, {"hidden": mx.zeros((1 << 20,), mx.float32)}, 60)
    if step == 14:
        say("running", time.time())

until_it_raises("ended", loop)
say("done", time.time())
"""
)

IDLE = PRELUDE + "sys.stdin.readline(); say('running', time.time()); sys.stdin.readline()\n"


class Stage:
    def __init__(self, script: str, tmp_path: Path, name: str) -> None:
        path = tmp_path / f"{name}.py"
        path.write_text(textwrap.dedent(script))
        self._process = subprocess.Popen(
            [sys.executable, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.pid = self._process.pid
        self._said: defaultdict[str, queue.SimpleQueue[list[str]]] = defaultdict(queue.SimpleQueue)
        threading.Thread(target=self._listen, daemon=True).start()
        self.address = self.hear("address")[0]

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")

    def hear(self, word: str) -> list[str]:
        """What the stage said after `word`: time, kind and reason."""
        return self._said[word].get(timeout=WAIT_S)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            word, *rest = line.split(maxsplit=3)
            self._said[word].put(rest)

    def resident(self) -> int:
        return int(psutil.Process(self.pid).memory_info().rss)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def stages(tmp_path: Path) -> Iterator[tuple[Stage, Stage]]:
    """Two stages that hand steps to each other."""
    pair = Stage(STAGE, tmp_path, "first"), Stage(STAGE, tmp_path, "second")
    for stage, peer in (pair, pair[::-1]):
        stage.tell(peer.address)
    for stage in pair:
        stage.hear("running")
    yield pair
    for stage in pair:
        stage.end()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("fault", "bound_s"), [(signal.SIGKILL, 5.0), (signal.SIGSTOP, 8.0)])
def test_the_loss_of_a_stage_is_told_in_time(
    stages: tuple[Stage, Stage], fault: signal.Signals, bound_s: float
) -> None:
    """Both links of the survivor fail (its callback is called for each), and its loop ends with the reason."""
    survivor, lost = stages
    start = time.time()
    os.kill(lost.pid, fault)
    for _ in range(2):
        told_at, kind, reason = survivor.hear("told")
        assert float(told_at) - start < bound_s
        assert kind == "PeerLostError"
        assert "away for more than 3 s" in reason
    ended_at, kind, _ = survivor.hear("ended")
    assert float(ended_at) - start < bound_s
    assert kind == "PeerLostError"


@pytest.mark.timeout(60)
def test_a_short_freeze_is_survived(stages: tuple[Stage, Stage]) -> None:
    survivor, frozen = stages
    os.kill(frozen.pid, signal.SIGSTOP)
    time.sleep(1.0)
    os.kill(frozen.pid, signal.SIGCONT)
    time.sleep(0.5)
    os.kill(frozen.pid, signal.SIGKILL)
    assert survivor.hear("told")[1] == "PeerLostError", "and no gap, no double step before that"


@pytest.mark.timeout(60)
def test_memory_stays_flat_while_the_receiver_takes_nothing(tmp_path: Path) -> None:
    """A sender without a pause against a stage that never receives: both hold a window (64 MiB) and no more."""
    receiver, sender = Stage(IDLE, tmp_path, "receiver"), Stage(SENDER, tmp_path, "sender")
    try:
        receiver.tell("")
        receiver.hear("running")
        before = receiver.resident(), sender.resident()
        sender.tell(receiver.address)
        sender.hear("running")
        time.sleep(1.0)
        grown = [stage.resident() - was for stage, was in zip((receiver, sender), before, strict=True)]
        assert max(grown) < 2.5 * (64 << 20), grown
        os.kill(receiver.pid, signal.SIGKILL)
        assert sender.hear("ended")[1] == "PeerLostError", "a send that waits for credit ends with the link"
    finally:
        receiver.end()
        sender.end()
