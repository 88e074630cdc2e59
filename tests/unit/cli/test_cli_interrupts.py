"""The first signal interrupts and is told of at once, later ones do not disturb the end, what was before comes back."""

import ctypes
import hashlib
import os
import signal
import sys
import threading
import time

import pytest

from pomarium.cluster.cli.interrupts import SIGNALS, Interrupts

LONG_S = 30.0


@pytest.mark.parametrize("first", SIGNALS)
def test_the_first_signal_interrupts_and_later_ones_are_ignored(first: signal.Signals) -> None:
    before = [signal.getsignal(s) for s in SIGNALS]
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), first)
        for later in SIGNALS:
            os.kill(os.getpid(), later)
        interrupts.install()
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(s) for s in SIGNALS] == before


def test_handlers_can_be_taken_back_from_another() -> None:
    with Interrupts() as interrupts:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        interrupts.install()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_it_is_told_at_once_whatever_the_main_thread_waits_for() -> None:
    """A call of C, as of Ray, keeps the handler of Python from running."""
    said: list[float] = []
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with Interrupts(lambda: said.append(time.monotonic())) as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.raising():  # noqa: PT012 - after the call
            began = time.monotonic()
            while not said:
                try:
                    hashlib.pbkdf2_hmac("sha256", b"", b"", 1_000_000)
                finally:
                    ended = time.monotonic()
                assert ended - began < LONG_S
            time.sleep(LONG_S)
        assert said[0] < ended, "told after the call"
        for later in SIGNALS:
            os.kill(os.getpid(), later)
        interrupts.install()
    assert len(said) == 1


def test_what_is_held_is_not_torn() -> None:
    done = []
    with Interrupts() as interrupts, interrupts.held():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("whole")
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            done.append("never")
    assert done == ["whole"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_one_that_is_lost_on_its_way_is_raised_again() -> None:
    class Swallows:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):
                pass

    reached = []
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt), interrupts.raising():
        reached.append(Swallows() is None)
    assert reached


def test_who_takes_sigterm_for_itself_in_c_does_not_get_it() -> None:
    """As Ray does, whose handler ends the process."""
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    with Interrupts() as interrupts, interrupts.held():
        with interrupts.guarding():
            libc.signal(signal.SIGTERM, None)  # SIG_DFL
            getsig = ctypes.pythonapi.PyOS_getsig
            getsig.restype = ctypes.c_void_p
            deadline = time.monotonic() + LONG_S
            while not getsig(signal.SIGTERM):
                assert time.monotonic() < deadline
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_who_takes_it_in_python_and_exits_is_interrupted() -> None:
    with Interrupts() as interrupts, interrupts.held():
        with pytest.raises(KeyboardInterrupt), interrupts.guarding():  # noqa: PT012 - two steps
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LONG_S)
        os.kill(os.getpid(), signal.SIGTERM)  # ignored again


def test_an_exit_of_another_reason_is_one() -> None:
    with Interrupts() as interrupts, pytest.raises(SystemExit), interrupts.guarding():
        sys.exit(3)
