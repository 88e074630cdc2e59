"""How long a step runs, seen from outside: idle time counts for nothing, a long one is told while it runs and after."""

import pytest

from pomarium.cluster.replica.step_watch import SLOW, StepWatch


def test_an_idle_engine_is_well_however_long() -> None:
    watch = StepWatch(1.0)
    watch.look(0.0, busy=False)
    assert (watch.running_s(1000.0), watch.word(1000.0)) == (0.0, "ok")
    watch.look(1000.0, busy=True)
    assert watch.running_s(1000.5) == 0.5


def test_a_step_that_takes_long_is_told_while_it_runs_and_until_the_next_has_ended() -> None:
    watch = StepWatch(1.0)
    watch.look(10.0, busy=True)
    watch.ended(10.4)
    assert watch.word(10.4 + SLOW) == "ok"
    assert watch.word(22.4) == "ok, but no step of its engine has ended for 12 s"
    watch.ended(23.4)
    assert watch.word(23.5) == "ok, but its engine's last step took 13 s"
    watch.look(24.0, busy=False)
    assert watch.word(24.0) == "ok, but its engine's last step took 13 s"
    watch.look(25.0, busy=True)
    watch.ended(25.1)
    assert watch.word(25.2) == "ok"


def test_what_is_long_follows_from_what_a_step_is_to_take() -> None:
    for target_s, slow_s in ((1.0, 5.0), (4.0, 20.0), (0.0, 5.0)):
        watch = StepWatch(target_s)
        watch.look(0.0, busy=True)
        assert watch.word(slow_s) == "ok"
        assert watch.word(slow_s + 1.0) != "ok"


def test_an_end_that_comes_late_is_no_step() -> None:
    """The last record of a batch may come after its requests were taken out."""
    watch = StepWatch(1.0)
    watch.ended(50.0)
    watch.look(50.0, busy=True)
    assert watch.running_s(50.25) == pytest.approx(0.25)
