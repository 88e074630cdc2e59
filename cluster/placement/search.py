"""The search behind place.py: dynamic programming over (Macs used, last Mac, first Mac, layers placed) on arrays.

    Problem --fastest--> for each number of stages: least way around with no stage or link slower than `cap`
            --fastest_round--> least max(cohorts x slowest, way around) for one number of stages
            --steadiest--> the most even cut among those that are equally fast
            --least_shortage--> least memory to be added for a cut to exist

Macs come as kinds, of one or more that cannot be told apart. A lattice (lattice.py) lists, level by level,
which kinds can be used in which order. A stage that ends before layer e on a Mac of kind m can begin at any layer of
[lo(m, e), e), because need and time only grow with it; and its time is P(m, e) - P(m, first) + constant. So a level
costs states x L log L with a table of window minima instead of states x L^2.

With L layers, R gathered rows in the lattice (n 2^(n-1) for n unlike Macs over equal links, about n^3 2^(n-3) over
unequal ones) and B = log2(distinct stage times) <= 17: `fastest` is O(R L + states L log L), `fastest_round` B times
that, `least_shortage` O(states L^2).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pomarium.cluster.placement.lattice import Lattice

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Slice = tuple[int, int, int]
"""(kind, first layer, end)"""

_ROUNDING = 1e-12
_NEVER = np.int64(1) << 61


@dataclass(frozen=True)
class Problem:
    """K kinds of Macs, L layers; bytes and seconds.

    Attributes:
        memory: (K,). need: (L + 1,), bytes of the layers before each. stage_bytes: of every stage.
        first_bytes, last_bytes, single_bytes: more on the first, on the last, and on a stage that is both.
        layer_s: (K, L + 1), seconds of the layers before each. stage_s: of every stage. head_s: (K,), of the last.
        hop_s, busy_s: (K, K), from row to column. back_s: (K, K), from the last stage's kind to the first one's.
    """

    memory: Integers
    need: Integers
    stage_bytes: int
    first_bytes: int
    last_bytes: int
    single_bytes: int
    layer_s: Floats
    stage_s: float
    head_s: Floats
    hop_s: Floats
    busy_s: Floats
    back_s: Floats

    @property
    def layers(self) -> int:
        """L."""
        return len(self.need) - 1


@dataclass(frozen=True)
class Found:
    """Slices in order, and the value that was minimised."""

    value: float
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class _Allowed:
    """lo: (K, L + 1), first allowed begin of an inner stage by its end. ends, heads: (K, L + 1), whether a first stage
    may end, a last one begin there. single: (K,)."""

    lo: Integers
    ends: NDArray[np.bool_]
    heads: NDArray[np.bool_]
    single: NDArray[np.bool_]


def _allowed(p: Problem, cap: float) -> _Allowed:
    cap = cap * (1 + _ROUNDING)
    size, positions = p.layers, np.arange(p.layers + 1)
    room, inner = p.memory[:, None] - p.stage_bytes, (positions >= 1) & (positions < size)
    fits = p.need[None, None, :] - p.need[None, :, None] <= room[:, :, None]
    quick = p.layer_s[:, None, :] - p.layer_s[:, :, None] + p.stage_s <= cap
    fine = fits & quick & (positions[:, None] < positions[None, :])
    lo = np.where(fine.any(axis=1), fine.argmax(axis=1), positions[None, :])
    last_s = p.layer_s[:, -1:] - p.layer_s + p.stage_s + p.head_s[:, None]
    return _Allowed(
        lo,
        ends=(p.need + p.first_bytes <= room) & (p.layer_s + p.stage_s <= cap) & inner,
        heads=(p.need[-1] - p.need + p.last_bytes <= room) & (last_s <= cap) & inner,
        single=(p.need[-1] + p.single_bytes <= room[:, 0]) & (last_s[:, 0] <= cap),
    )


def fastest(p: Problem, lattice: Lattice, most: int, cap: float = np.inf) -> "Way":
    """The least sum of stages, hops and way back for 1, 2, ... `most` stages, none and no link slower than `cap`."""
    allowed = _allowed(p, cap)
    hop_s = np.where(p.busy_s <= cap * (1 + _ROUNDING), p.hop_s, np.inf)
    whole = p.layer_s[:, -1] + p.stage_s + p.head_s
    kinds = lattice.levels[0].kind
    placed = [_padded(np.where(allowed.ends, p.layer_s + p.stage_s, np.inf)[kinds])]
    closed = [np.where(allowed.single, whole, np.inf)[kinds]]
    for before, level in zip(lattice.levels[: most - 1], lattice.levels[1:most], strict=True):
        if lattice.equal_hops:
            entered = placed[-1][before.members].min(axis=1)[level.bag] + hop_s.min()
        else:
            members = before.members[level.bag]
            hops = hop_s[np.append(before.kind, 0)[members], level.kind[:, None]]
            entered = (placed[-1][members] + hops[:, :, None]).min(axis=1)
        relative = entered - p.layer_s[level.kind]
        best = _window_minima(relative, allowed.lo[level.kind])
        best[:, -1] = np.inf  # the last layer comes with the head
        placed.append(_padded(best + p.layer_s[level.kind] + p.stage_s))
        closing = np.where(allowed.heads[level.kind], relative, np.inf).min(axis=1)
        closed.append(closing + whole[level.kind] + _back(p, lattice, level.kind, level.first))
    return Way(p, lattice, allowed, hop_s, placed, closed)


@dataclass(frozen=True)
class Way:
    """What `fastest` computed. placed: per level (states + 1, L + 1). closed: per level (states,)."""

    problem: Problem
    lattice: Lattice
    allowed: _Allowed
    hop_s: Floats
    placed: list[Floats]
    closed: list[Floats]

    def value(self, stages: int) -> float:
        """Least way around with that many stages; infinite if there is none."""
        return float(self.closed[stages - 1].min()) if stages <= len(self.closed) else np.inf

    def slices(self, stages: int) -> tuple[Slice, ...]:
        """The cut behind `value`, which must be finite, traced from its last stage back."""
        p, state, end = self.problem, int(self.closed[stages - 1].argmin()), self.problem.layers
        found: list[Slice] = []
        for depth in range(stages - 1, 0, -1):
            before, level = self.lattice.levels[depth - 1], self.lattice.levels[depth]
            kind, members = int(level.kind[state]), before.members[level.bag[state]]
            begins = np.arange(p.layers + 1)
            fine = self.allowed.heads[kind] if end == p.layers else (begins >= self.allowed.lo[kind, end])
            hops = self.hop_s.min() if self.lattice.equal_hops else self.hop_s[np.append(before.kind, 0)[members], kind]
            entered = self.placed[depth - 1][members] + np.reshape(hops, (-1, 1)) - p.layer_s[kind]
            entered[:, ~(fine & (begins < end))] = np.inf
            which, begin = map(int, np.unravel_index(int(entered.argmin()), entered.shape))
            found.append((kind, begin, end))
            state, end = int(members[which]), begin
        found.append((int(self.lattice.levels[0].kind[state]), 0, end))
        return tuple(reversed(found))


def fastest_round(p: Problem, lattice: Lattice, stages: int, cohorts: int, below: float) -> Found | None:
    """The least max(cohorts x slowest stage or link, way around) with `stages` stages; None unless under `below`.

    The way around W(cap) falls, if at all, as the cap on stages rises, so the best cap is the first with
    cohorts x cap >= W(cap), or the one before. W is nearly flat, and each value of it bounds where that is.
    """
    if cohorts == 1:
        way = fastest(p, lattice, stages)
        return Found(way.value(stages), way.slices(stages)) if way.value(stages) < below else None
    caps = _stage_seconds(p)
    caps = caps[cohorts * caps < below]
    if not len(caps):
        return None
    best = fastest(p, lattice, stages, float(caps[-1]))
    least = max(cohorts * float(caps[-1]), best.value(stages))
    if best.value(stages) >= below:
        return None
    if best.value(stages) <= cohorts * caps[-1]:
        low, high = int(np.searchsorted(caps, best.value(stages) / cohorts * (1 - _ROUNDING))), len(caps) - 1
        seen: dict[int, Way] = {high: best}
        while low < high:
            middle = (low + high) // 2
            way = seen[middle] = fastest(p, lattice, stages, float(caps[middle]))
            crossing = int(np.searchsorted(caps, way.value(stages) / cohorts * (1 - _ROUNDING)))
            if crossing <= middle:
                low, high = max(low, crossing), middle
            else:
                low, high = middle + 1, min(high, crossing)
        for index in range(max(0, high - 1), high + 1):
            way = seen.get(index) or fastest(p, lattice, stages, float(caps[index]))
            value = max(cohorts * float(caps[index]), way.value(stages))
            if value < least:
                least, best = value, way
    return Found(least, best.slices(stages))


def steadiest(p: Problem, lattice: Lattice, stages: int, around: float) -> tuple[Slice, ...]:
    """Of the cuts whose way around is at most `around`, which must exist, one with the least slow stage or link."""
    caps = _stage_seconds(p)
    low, high = 0, len(caps) - 1
    best = fastest(p, lattice, stages, float(caps[high]))
    while low < high:
        middle = (low + high) // 2
        way = fastest(p, lattice, stages, float(caps[middle]))
        if way.value(stages) <= around:
            high, best = middle, way
        else:
            low = middle + 1
    return best.slices(stages)


def _stage_seconds(p: Problem) -> Floats:
    """Every time that a stage or link can take, rising."""
    first, end = np.triu_indices(p.layers + 1, 1)
    inner = p.layer_s[:, end] - p.layer_s[:, first] + p.stage_s
    last = p.layer_s[:, -1:] - p.layer_s[:, :-1] + p.stage_s + p.head_s[:, None]
    return np.unique(np.concatenate([inner.ravel(), last.ravel(), p.busy_s.ravel()]))


def least_shortage(p: Problem, lattice: Lattice, fewest: int, most: int) -> Found:
    """The least sum over stages of bytes beyond a Mac's memory, over `fewest` to `most` stages. Links do not matter."""
    short = np.maximum(0, p.need[None, None, :] - p.need[None, :, None] + p.stage_bytes - p.memory[:, None, None])
    size = p.layers
    kinds = lattice.levels[0].kind
    start = np.maximum(0, p.need + p.first_bytes + p.stage_bytes - p.memory[:, None])
    finish = np.maximum(0, p.need[-1] - p.need + p.last_bytes + p.stage_bytes - p.memory[:, None])
    start[:, [0, size]] = finish[:, [0, size]] = _NEVER
    whole = np.maximum(0, p.need[-1] + p.single_bytes + p.stage_bytes - p.memory)
    placed: list[Integers] = [_padded_integers(start[kinds])]
    closed: list[Integers] = [whole[kinds]]
    for before, level in zip(lattice.levels[: most - 1], lattice.levels[1:most], strict=True):
        entered = placed[-1][before.members].min(axis=1)[level.bag]
        best = np.full_like(entered, _NEVER)
        for begin in range(1, size - 1):
            ends = slice(begin + 1, size)
            np.minimum(best[:, ends], entered[:, begin, None] + short[level.kind, begin, ends], out=best[:, ends])
        placed.append(_padded_integers(np.minimum(best, _NEVER)))
        closed.append((entered + finish[level.kind]).min(axis=1))
    values = [int(c.min()) for c in closed]
    stages = min(range(fewest, len(values) + 1), key=lambda s: values[s - 1])
    state, end, found = int(closed[stages - 1].argmin()), size, list[Slice]()
    for depth in range(stages - 1, 0, -1):
        before, level = lattice.levels[depth - 1], lattice.levels[depth]
        kind, members = int(level.kind[state]), before.members[level.bag[state]]
        cost = finish[kind] if end == size else short[kind, :, end]
        total = placed[depth - 1][members][:, :end] + cost[:end]
        which, begin = map(int, np.unravel_index(int(total.argmin()), total.shape))
        found.append((kind, begin, end))
        state, end = int(members[which]), begin
    found.append((int(lattice.levels[0].kind[state]), 0, end))
    return Found(values[stages - 1], tuple(reversed(found)))


def _back(p: Problem, lattice: Lattice, kind: Integers, first: Integers) -> Floats | float:
    if lattice.tracks_first:
        back: Floats = p.back_s[kind, first]
        return back
    return float(p.back_s.min())


def _padded(rows: Floats) -> Floats:
    """One row more, of infinity, which padded member lists point to."""
    return np.vstack([rows, np.full((1, rows.shape[1]), np.inf)])


def _padded_integers(rows: Integers) -> Integers:
    return np.vstack([rows, np.full((1, rows.shape[1]), _NEVER, np.int64)])


def _window_minima(rows: Floats, lo: Integers) -> Floats:
    """Minimum of rows[s, lo[s, e]:e] for every e; infinite where the window is empty."""
    states, width = rows.shape
    tables, step = [rows], 1
    while 2 * step <= width:
        half = tables[-1]
        table = np.full_like(half, np.inf)
        table[:, : width - step] = np.minimum(half[:, : width - step], half[:, step:])
        tables.append(table)
        step *= 2
    ends = np.arange(width)[None, :]
    length = ends - lo
    power = np.frexp(np.maximum(length, 1))[1] - 1  # floor(log2(length))
    stacked, row = np.stack(tables), np.arange(states)[:, None]
    begin = np.minimum(lo, width - 1)
    tail = np.maximum(ends - (1 << power), 0)
    found = np.minimum(stacked[power, row, begin], stacked[power, row, tail])
    return np.where(length > 0, found, np.inf)
