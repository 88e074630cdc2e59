"""Which models of a machine are in its memory: single decisions, and whole days of requests played through them."""

from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.cluster.endpoint.residence import Decision, Phase, Resident, Rules, decide, never, unfit

RULES = Rules(10, keep_s=600.0)


def up(name: str, size: int, used: float, **more: object) -> Resident:
    return replace(Resident(name, size, phase=Phase.UP, used=used), **more)


def test_what_is_asked_for_is_loaded_where_there_is_room() -> None:
    models = [Resident("a", 4, waiting=1.0), Resident("b", 6, waiting=2.0), Resident("c", 1)]
    assert decide(models, 3.0, RULES) == Decision(("a", "b"))


def test_the_least_recently_used_leaves_and_no_more_than_have_to() -> None:
    there = [up("old", 2, 10.0), up("older", 2, 5.0), up("new", 6, 90.0)]
    assert decide([*there, Resident("w", 2, waiting=99.0)], 100.0, RULES).leave == {"older"}
    assert decide([*there, Resident("w", 4, waiting=99.0)], 100.0, RULES).leave == {"old", "older"}
    assert decide([*there, Resident("w", 6, waiting=99.0)], 100.0, RULES).leave == {"new"}
    assert decide([*there, Resident("w", 10, waiting=99.0)], 100.0, RULES).leave == {"old", "older", "new"}


def test_a_model_leaves_for_another_once_it_is_idle_or_has_had_its_turn() -> None:
    waits = Resident("b", 6, waiting=20.0)
    busy = up("a", 6, 20.0, running=1, since=10.0)
    assert decide([busy, waits], 20.0, RULES) == Decision(waits={"b": "it waits for memory that a takes"})
    assert decide([busy, waits], 40.0, RULES) == Decision(
        leave=frozenset({"a"}), waits={"b": "a leaves memory for others"}
    )
    idle = up("a", 6, 20.0, since=10.0)
    assert not decide([idle, waits], 21.0, RULES).leave
    assert decide([idle, waits], 22.0, RULES).leave == {"a"}


def test_nothing_is_loaded_before_what_leaves_is_gone() -> None:
    waits = Resident("b", 6, waiting=20.0)
    assert not decide([up("a", 6, 0.0), waits], 50.0, RULES).load
    assert not decide([Resident("a", 6, phase=Phase.ENDING), waits], 50.0, RULES).load
    assert decide([Resident("a", 6), waits], 50.0, RULES).load == ("b",)


def test_who_waits_longest_is_not_passed_by() -> None:
    busy = up("a", 6, 20.0, running=1, since=19.0)
    models = [busy, Resident("b", 6, waiting=20.0), Resident("c", 4, waiting=21.0)]
    assert not decide(models, 22.0, RULES).load, "c would take what b waits for"
    small = [busy, Resident("b", 6, waiting=20.0), Resident("c", 4, waiting=21.0)]
    assert decide(small, 22.0, replace(RULES, memory=16)).load == ("b", "c")


def test_what_is_pinned_comes_first_and_stays() -> None:
    pinned = up("a", 6, 0.0, pinned=True)
    assert decide([pinned, Resident("b", 4, waiting=1.0)], 1e6, RULES).load == ("b",)
    assert decide([pinned, up("b", 4, 1e6, running=1), Resident("c", 4, waiting=1.0)], 1e6, RULES).leave == {"b"}
    assert decide([Resident("a", 6, pinned=True), Resident("b", 6, waiting=1.0)], 2.0, RULES).load == ("a",)


def test_an_idle_one_is_kept_for_a_while() -> None:
    assert not decide([up("a", 6, 100.0)], 699.0, RULES).leave
    assert decide([up("a", 6, 100.0)], 700.0, RULES).leave == {"a"}
    assert not decide([up("a", 6, 100.0, pinned=True)], 1e9, RULES).leave


def test_a_model_that_never_fits_is_told_why() -> None:
    gib = 1 << 30
    models = [Resident("a", 6 * gib, pinned=True), Resident("b", 5 * gib), Resident("c", 20 * gib)]
    assert [never(model, models, 10 * gib) is None for model in models] == [True, False, False]
    said = never(models[1], models, 10 * gib)
    assert said is not None
    assert said.startswith(
        "b takes 5 GiB and never fits: this machine has 10 GiB for models, of which a, kept by --pin"
    )
    assert never(models[1], models[1:], 10 * gib) is None
    alone = never(models[2], models[2:], 10 * gib)
    assert alone is not None
    assert "has 10 GiB for models; give --max-model-len" in alone
    assert set(unfit({"a": 6, "b": 5, "c": 20}, {"a"}, 10)) == {"b", "c"}


# --- days of requests -----------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A request: of which model, from when, for how long an engine has it; when it began."""

    model: str
    at: float
    lasts: float
    began: float | None = None


@dataclass
class Machine:
    """A machine that does what is decided, each second, and checks it."""

    models: dict[str, Resident]
    jobs: list[Job]
    rules: Rules
    loading_s: float
    ending_s: float
    now: float = 0.0
    changes: dict[str, float] = field(default_factory=dict)
    leave: frozenset[str] = frozenset()

    def step(self) -> None:
        for name, model in self.models.items():
            runs = [j for j in self.jobs if j.model == name and j.began is not None and self.now < j.began + j.lasts]
            held = [j.at for j in self.jobs if j.model == name and j.began is None and j.at <= self.now]
            model = replace(model, running=len(runs), waiting=min(held, default=None))
            if model.phase is Phase.LOADING and self.now - self.changes[name] >= self.loading_s:
                model = replace(model, phase=Phase.UP, since=self.now, used=self.now)
            if model.phase is Phase.ENDING and self.now - self.changes[name] >= self.ending_s:
                model = replace(model, phase=Phase.ABSENT)
            self.models[name] = replace(model, used=self.now if runs else model.used)
        before = dict(self.models)
        decision = decide(list(self.models.values()), self.now, self.rules)
        self.leave = decision.leave
        for name in decision.leave:
            model = self.models[name]
            assert model.phase is Phase.UP
            assert not model.pinned
            waits = any(m.waiting is not None for m in before.values() if m.name != name)
            forgotten = self.now - model.used >= self.rules.keep_s
            had_turn = self.now - model.since >= self.rules.turn_s or self.now - model.used >= self.rules.settle_s
            assert forgotten or (waits and had_turn)
            if not model.running:
                self._enter(name, Phase.ENDING)
        for name in decision.load:
            assert self.models[name].phase is Phase.ABSENT
            self._enter(name, Phase.LOADING)
        taken = sum(m.size for m in self.models.values() if m.phase is not Phase.ABSENT)
        assert taken <= self.rules.memory
        for job in self.jobs:
            there = self.models[job.model].phase is Phase.UP and job.model not in decision.leave
            if job.began is None and job.at <= self.now and there:
                job.began = self.now
                self.models[job.model] = replace(self.models[job.model], used=self.now)
        self.now += 1.0

    def _enter(self, name: str, phase: Phase) -> None:
        self.models[name] = replace(self.models[name], phase=phase)
        self.changes[name] = self.now


@st.composite
def machines(draw: st.DrawFn) -> Machine:
    memory = draw(st.integers(4, 20))
    sizes = draw(st.lists(st.integers(1, memory), min_size=1, max_size=5))
    models = {f"m{i}": Resident(f"m{i}", size) for i, size in enumerate(sizes)}
    if draw(st.booleans()):
        models["m0"] = replace(models["m0"], pinned=True)
    fitting = [name for name, model in models.items() if never(model, models.values(), memory) is None]
    models = {name: models[name] for name in fitting}
    job = st.builds(Job, st.sampled_from(fitting), st.integers(0, 120).map(float), st.integers(0, 20).map(float))
    rules = Rules(memory, draw(st.sampled_from([30.0, 600.0])))
    jobs = draw(st.lists(job, max_size=25))
    return Machine(models, jobs, rules, float(draw(st.integers(0, 9))), float(draw(st.integers(0, 4))))


@settings(max_examples=200, deadline=None)
@given(machines())
def test_whatever_is_asked_is_answered_and_memory_is_never_exceeded(machine: Machine) -> None:
    turns = len(machine.jobs) + len(machine.models) + 1
    longest = 120 + turns * (machine.loading_s + machine.ending_s + machine.rules.turn_s + 25.0)
    while machine.now < longest and any(job.began is None for job in machine.jobs):
        machine.step()
    assert all(job.began is not None for job in machine.jobs)


def test_two_that_are_asked_all_the_time_take_turns() -> None:
    models = {name: Resident(name, 6) for name in "ab"}
    jobs = [Job(name, float(at), 3.0) for at in range(600) for name in "ab"]
    machine, ups = Machine(models, jobs, RULES, 5.0, 1.0), []
    for _ in range(600):
        before = {name: model.phase for name, model in machine.models.items()}
        machine.step()
        ups += [machine.now for n, m in machine.models.items() if m.phase is Phase.UP and before[n] is Phase.LOADING]
    lengths = [later - before for before, later in pairwise(ups)]
    assert len(ups) >= 12
    assert min(lengths) >= RULES.turn_s
    waits = [job.began - job.at for job in jobs if job.began is not None]
    assert max(waits) < 3 * RULES.turn_s


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_the_models_does_not_matter(names: list[str]) -> None:
    known = {
        "a": up("a", 4, 1.0), "b": up("b", 4, 1.0),
        "c": Resident("c", 6, waiting=2.0), "d": Resident("d", 2, waiting=2.0),
    }  # fmt: skip
    found = decide([known[name] for name in names], 50.0, RULES)
    assert found == decide(list(known.values()), 50.0, RULES)


@pytest.mark.parametrize("running", [0, 1])
def test_a_model_that_leaves_stays_after_all_if_nobody_waits_any_more(running: int) -> None:
    leaving = up("a", 6, 20.0, running=running, since=0.0)
    assert decide([leaving, Resident("b", 6, waiting=20.0)], 50.0, RULES).leave == {"a"}
    assert not decide([leaving, Resident("b", 6)], 50.0, RULES).leave
