"""Which models of one machine are in its memory, where all do not fit at once: a pure decision.

    Resident of each model, Rules, the time --decide--> what is loaded, what makes room for it, who waits and for whom

Requests for models that are not there are served in the order in which they came, so none is passed by for ever:

- Who waits longest gets what is free; where that is too little, models leave for it, those first that nobody has used
  for longest.
- A model leaves for another once nobody asks it anything (`settle_s`), or once it has had its turn (`turn_s`), busy or
  not: then it takes no new request and leaves when the last one is answered.
- What waits keeps its room: who came later is loaded beside it or behind it.

So two models that do not fit at once and are asked in turn change places after a turn each at the soonest, and no
answer is cut. Sizes are bytes, times seconds of one clock.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from pomarium.cluster.machine.units import format_size


class Phase(Enum):
    """Of a model: not in memory; on its way there; there; its processes are ending, and hold memory as long."""

    ABSENT = "absent"
    LOADING = "loading"
    UP = "up"
    ENDING = "ending"


@dataclass(frozen=True)
class Resident:
    """A model as it is now.

    Attributes:
        name: in requests. size: bytes that it takes unless it is ABSENT. pinned: it is loaded at the start and stays.
        since: when it came UP. used: when it was last needed. running: requests that it has taken.
        waiting: since when its oldest held request waits; None: none is held.
    """

    name: str
    size: int
    pinned: bool = False
    phase: Phase = Phase.ABSENT
    since: float = 0.0
    used: float = 0.0
    running: int = 0
    waiting: float | None = None


@dataclass(frozen=True)
class Rules:
    """What holds for all.

    Attributes:
        memory: bytes for models. keep_s: how long one stays that nobody asks. turn_s: how long one is there at least
            before it leaves for others while it is asked; settle_s: how long nobody has asked it before it does.
    """

    memory: int
    keep_s: float
    turn_s: float = 30.0
    settle_s: float = 2.0


@dataclass(frozen=True)
class Decision:
    """What is to be done.

    Attributes:
        load: models that there is room for now. leave: models that take no new request, and go once none runs.
        waits: why requests for a model are held although it is not being loaded, a clause, by name.
    """

    load: tuple[str, ...] = ()
    leave: frozenset[str] = frozenset()
    waits: dict[str, str] = field(default_factory=dict)


def never(model: Resident, models: Iterable[Resident], memory: int) -> str | None:
    """Why `model` can never be loaded, one sentence; None: it can, once others have left."""
    pinned = [other for other in models if other.pinned and other.name != model.name]
    left = memory - sum(other.size for other in pinned)
    if model.size <= left:
        return None
    beside = ""
    if pinned:
        take = "takes" if len(pinned) == 1 else "take"
        beside = f", of which {_names(pinned)}, kept by --pin, {take} {format_size(memory - left)}"
    return (
        f"{model.name} takes {format_size(model.size)} and never fits: this machine has {format_size(memory)} for "
        f"models{beside}; give --max-model-len, or serve a smaller one."
    )


def unfit(sizes: Mapping[str, int], pinned: Collection[str], memory: int) -> dict[str, str]:
    """Of the models that can never be loaded, why, by name. What is pinned fits together."""
    models = [Resident(name, size, name in pinned) for name, size in sizes.items()]
    found = {model.name: never(model, models, memory) for model in models}
    return {name: reason for name, reason in found.items() if reason is not None}


def decide(models: Sequence[Resident], now: float, rules: Rules) -> Decision:
    """What is to be done at `now`. Models that never fit are left out by the caller."""
    there = [model for model in models if model.phase is not Phase.ABSENT]
    free = rules.memory - sum(model.size for model in there)
    coming = sum(model.size for model in there if model.phase is Phase.ENDING)
    reserved = 0
    load: list[str] = []
    leave = {model.name: model for model in there if _forgotten(model, now, rules)}
    waits: dict[str, str] = {}
    for model in _queue(models):
        if model.phase is Phase.UP:  # it waits itself only if it has to leave for who came before
            reserved += model.size if model.name in leave else 0
            continue
        promised = free + coming + sum(other.size for other in leave.values()) - reserved
        if promised < model.size:
            chosen = _leaving(there, leave, model.size - promised, now, rules)
            leave |= {other.name: other for other in chosen}
            promised += sum(other.size for other in chosen)
        if model.phase is Phase.ABSENT and model.size <= min(free, promised):
            load.append(model.name)
            free -= model.size
        else:
            reserved += model.size
            coming_in = [other for other in models if other.name in load]
            waits[model.name] = _why([*there, *coming_in], leave, model, promised)
    return Decision(tuple(load), frozenset(leave), waits)


def _queue(models: Iterable[Resident]) -> list[Resident]:
    """Who waits, the longest first; what is pinned before all."""
    wanted = [m for m in models if m.waiting is not None or (m.pinned and m.phase is Phase.ABSENT)]
    return sorted(
        (m for m in wanted if m.phase is not Phase.LOADING),
        key=lambda m: (not m.pinned, m.waiting if m.waiting is not None else float("-inf"), m.name),
    )


def _forgotten(model: Resident, now: float, rules: Rules) -> bool:
    idle = model.phase is Phase.UP and model.running == 0 and model.waiting is None
    return idle and not model.pinned and now - model.used >= rules.keep_s


def _leaving(
    there: Iterable[Resident], leave: Iterable[str], missing: int, now: float, rules: Rules
) -> tuple[Resident, ...]:
    """The models that leave for `missing` bytes, none of which could stay; none if all that may leave are too few."""
    able = [m for m in there if m.name not in leave and _may_leave(m, now, rules)]
    chosen: list[Resident] = []
    for model in sorted(able, key=lambda m: (m.running > 0, m.used, m.name)):
        if sum(other.size for other in chosen) >= missing:
            break
        chosen.append(model)
    spare = sum(other.size for other in chosen) - missing
    if spare < 0:
        return ()
    for model in reversed(tuple(chosen)):
        if model.size <= spare:
            chosen.remove(model)
            spare -= model.size
    return tuple(chosen)


def _may_leave(model: Resident, now: float, rules: Rules) -> bool:
    if model.phase is not Phase.UP or model.pinned:
        return False
    quiet = model.running == 0 and now - model.used >= rules.settle_s
    return quiet or now - model.since >= rules.turn_s


def _why(there: Sequence[Resident], leave: Iterable[str], model: Resident, promised: int) -> str:
    if model.phase is Phase.ENDING:
        return "its last processes are ending"
    going = [m for m in there if m.phase is Phase.ENDING or m.name in leave]
    if promised >= model.size and going:
        return f"{_names(going)} {'leaves' if len(going) == 1 else 'leave'} memory for others"
    held = [m for m in there if not m.pinned]
    if not held:
        return "others wait for memory before it"
    return f"it waits for memory that {_names(held)} {'takes' if len(held) == 1 else 'take'}"


def _names(models: Sequence[Resident]) -> str:
    *first, last = sorted(model.name for model in models)
    return f"{', '.join(first)} and {last}" if first else last
