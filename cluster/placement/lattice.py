"""In which order kinds of Macs can be used: the states that search.py computes over, level by level.

    counts of each kind --exact_lattice--> every multiset and order, merged where only sets matter
                        --ordered_lattice--> one given order of Macs, any of which may be left out

A state of level k is a way to have used k Macs: which kinds (its bag), which came last, and, if the way back to it
costs differently from Mac to Mac, which came first. Of a bag's states the next Mac sees no difference but its hop.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

MOST_ROWS = 25_000
"""Bound on the rows that one sweep over an exact lattice gathers: about 0.1 s of computing for 80 layers."""


@dataclass(frozen=True)
class Level:
    """kind, first: (states,), the kinds of the last and first Mac. bag: (states,), the bag of the previous level that a
    state continues. members: (bags, width), the states of this level in each bag, padded with the number of states."""

    kind: Integers
    first: Integers
    bag: Integers
    members: Integers


@dataclass(frozen=True)
class Lattice:
    """equal_hops: a hop costs the same between any two Macs. tracks_first: `Level.first` holds the truth, not 0."""

    levels: tuple[Level, ...]
    equal_hops: bool
    tracks_first: bool
    exact: bool


def exact_lattice(counts: tuple[int, ...], depth: int, *, equal_hops: bool, equal_back: bool) -> Lattice | None:
    """All ways to use up to `depth` Macs; None if a sweep over them gathers more than MOST_ROWS rows."""
    levels: list[Level] = []
    bags: dict[tuple[tuple[int, ...], int], list[int]] = {(tuple(0 for _ in counts), -1): []}
    rows = 0
    for _ in range(min(depth, sum(counts))):
        kind: list[int] = []
        first: list[int] = []
        bag: list[int] = []
        following: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for index, ((used, began), members) in enumerate(bags.items()):
            for k, count in enumerate(counts):
                if used[k] == count:
                    continue
                start = 0 if equal_back else (k if began < 0 else began)
                key = ((*used[:k], used[k] + 1, *used[k + 1 :]), start)
                following.setdefault(key, []).append(len(kind))
                kind.append(k)
                first.append(start)
                bag.append(index)
                rows += 1 if equal_hops else max(1, len(members))
        if rows > MOST_ROWS:
            return None
        levels.append(_level(kind, first, bag, list(following.values())))
        bags = following
    return Lattice(tuple(levels), equal_hops, tracks_first=not equal_back, exact=True)


def ordered_lattice(macs: int, depth: int, *, equal_hops: bool) -> Lattice:
    """Macs 0, 1, ... in this order, each used or left out. What the way back costs is not told apart."""
    levels = []
    for k in range(min(depth, macs)):
        # State i of this level is the use of Mac k + i; the bag of the next level's state j holds all Macs before it.
        kind = list(range(k, macs))
        bags = [list(range(i + 1)) for i in range(len(kind) - 1)]
        bag = [0] * macs if k == 0 else list(range(len(kind)))
        levels.append(_level(kind, [0] * len(kind), bag, bags or [[0]]))
    return Lattice(tuple(levels), equal_hops, tracks_first=False, exact=False)


def equal_between(values: NDArray[np.float64], counts: tuple[int, ...]) -> bool:
    """Whether all pairs of Macs that exist have one value; the diagonal is a pair within a kind."""
    pairs = list(combinations(range(len(counts)), 2))
    used = [values[pair] for pair in pairs] + [values[j, i] for i, j in pairs]
    used += [values[k, k] for k, count in enumerate(counts) if count > 1]
    return len(set(map(float, used))) <= 1


def _level(kind: list[int], first: list[int], bag: list[int], bags: list[list[int]]) -> Level:
    width = max(map(len, bags))
    members = np.full((len(bags), width), len(kind), np.int64)
    for index, states in enumerate(bags):
        members[index, : len(states)] = states
    return Level(np.array(kind, np.int64), np.array(first, np.int64), np.array(bag, np.int64), members)
