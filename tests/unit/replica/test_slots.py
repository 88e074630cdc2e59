"""How many requests an engine is to have, by what its steps show."""

from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.http.room import Room
from pomarium.cluster.replica.slots import FIRST, GAP_S, GROWTH, LEAST, PERIOD_S, Seen, Slots, adjusted

SEEN = st.builds(Seen, st.floats(0, 500), st.floats(0, 500), st.none() | st.floats(1e-4, 100), st.floats(0, 100))


class Engine:
    """Steps that take a fixed time and one more for each request, of as many as there are slots for."""

    def __init__(self, fixed_s: float, each_s: float, most: int = 256) -> None:
        self.now = 0.0
        self.fixed_s, self.each_s = fixed_s, each_s
        self.slots = Slots(most, clock=lambda: self.now)

    def run(self, seconds: float, running: int | None = None, waiting: int = 0) -> int:
        end = self.now + seconds
        while self.now < end:
            count = self.slots.count if running is None else min(running, self.slots.count)
            self.now += self.fixed_s + count * self.each_s
            self.slots.ended(count, waiting, count)
        return self.slots.count


@given(st.integers(1, 300), SEEN, st.integers(1, 300), st.integers(1, 40))
def test_bounds_hold(slots: int, seen: Seen, most: int, floor: int) -> None:
    after = adjusted(slots, seen, most, floor)
    assert min(floor, most) <= after <= most
    if after > max(slots, LEAST, floor):
        assert after <= max(slots + 1, slots * GROWTH)


def test_a_fast_engine_gets_all_that_it_takes() -> None:
    assert Engine(0.005, 0.0001).run(30) == 256


def test_a_slow_one_gets_as_many_as_leave_people_their_pace() -> None:
    engine = Engine(0.02, 0.005)
    engine.run(5, running=1)
    count = engine.run(1200)
    assert 0.5 * GAP_S < engine.fixed_s + count * engine.each_s < 1.5 * GAP_S


def test_one_whose_single_steps_are_long_is_used_all_the_same() -> None:
    engine = Engine(0.5, 0.01)
    engine.run(20, running=1)
    assert engine.run(200) >= 60, "the step is 1.2 s, and hardly longer than for one"


def test_nothing_grows_that_is_not_used() -> None:
    assert Engine(0.005, 0.0001).run(30, running=3) == FIRST


def test_what_found_no_room_in_the_cache_waits_elsewhere() -> None:
    engine = Engine(0.01, 0.0001)
    engine.run(10)
    engine.run(5, running=5, waiting=20)
    assert engine.slots.count == 6
    assert engine.run(60) > 50, "and comes back"


def test_a_scaled_model_has_slots_enough_for_serve_to_see_its_load() -> None:
    assert adjusted(40, Seen(2.0, 20.0, 0.1, 0.1), 256, floor=16) == 16
    assert adjusted(40, Seen(40.0, 0.0, 60.0, 0.1), 256, floor=16) == 32


def test_pauses_are_no_steps() -> None:
    engine = Engine(0.02, 0.001)
    before = engine.run(10)
    engine.slots.ended(0, 0, 0)
    engine.now += 3600.0
    engine.slots.ended(1, 0, 1)
    engine.now += PERIOD_S
    assert engine.run(2) >= before // 2


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_a_room_comes_as_it_was_told(slots: int, tokens: int) -> None:
    room = Room(slots, tokens)
    assert Room.unpacked(room.packed()) == room
