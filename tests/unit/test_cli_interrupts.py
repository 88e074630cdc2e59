"""The first signal interrupts, later ones do not disturb the end, and the handlers of before come back."""

import os
import signal

import pytest

from pomarium.cluster.cli.interrupts import SIGNALS, Interrupts


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
