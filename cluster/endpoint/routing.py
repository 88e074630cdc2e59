"""Which replica gets a request: the one whose prefix cache knows most of the prompt, unless it is too busy.

    fields --http/prompts.py--> text --prefix_keys--> keys --PrefixTable.matched--> Candidate --rank--> replicas to try

A key stands for a piece of PIECE characters and all that come before it, so two prompts have as many leading keys in
common as whole pieces. The table remembers which keys each replica was sent: it guesses what vLLM's cache holds and
asks nobody. Everything here is pure but the table; `prefix_router.py` is Serve's side of it, `ledger.py` what it knows.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Generic, TypeVar

from pomarium.cluster.http.prompts import prompt_text
from pomarium.cluster.http.protocols import PROMPTED

R = TypeVar("R", bound=Hashable)
"""Names a replica."""

PIECE = 64
"""Characters per key: about 16 tokens, a block of vLLM's cache."""

MOST_PIECES = 4096
"""What is longer than these pieces is not looked at."""

MOST_KEYS = 65_536
"""Keys remembered per replica, some 6 MiB; the prompts that were not seen for longest are forgotten first."""

LEAST_SHARE = 0.1
"""Below this share of known pieces a prompt counts as new."""

MOST_EXCESS = 8
"""How many requests more than the least busy one a replica may have and still get a prompt that it knows entirely; for
a prompt that it knows in part, that part of it."""


class NoReplicaError(Exception):
    """No replica of the model runs."""


@dataclass(frozen=True)
class Candidate(Generic[R]):
    """What is known of one replica when a request comes.

    Attributes:
        load: requests that it was sent and has not ended.
        matched: leading pieces of the prompt that it was sent before.
        held: pieces that it is believed to hold.
        silent: it was sent something and gave no sign since.
    """

    replica: R
    load: int
    matched: int
    held: int
    silent: bool = False


def rank(candidates: Sequence[Candidate[R]], pieces: int, random: Random) -> list[list[R]]:
    """Groups of replicas to try in this order for a prompt of `pieces`; within a group the least busy one goes first.

    First the replicas that know most of it and are not too busy (MOST_EXCESS), then two at random (the power of two
    choices; equally busy, the one that holds less comes first), last those that are silent.
    """
    answering = [c for c in candidates if not c.silent]
    groups = [_affine(answering, pieces), _two(answering, random), [c for c in candidates if c.silent]]
    return [[c.replica for c in sorted(group, key=lambda c: (c.load, c.held))] for group in groups if group]


def _affine(answering: Sequence[Candidate[R]], pieces: int) -> list[Candidate[R]]:
    if not pieces or not answering:
        return []
    least = min(c.load for c in answering)
    knowing = [
        c for c in answering if c.matched >= LEAST_SHARE * pieces and c.load - least <= MOST_EXCESS * c.matched / pieces
    ]
    most = max((c.matched for c in knowing), default=0)
    return [c for c in knowing if c.matched == most]


def _two(answering: Sequence[Candidate[R]], random: Random) -> list[Candidate[R]]:
    return random.sample(answering, min(2, len(answering)))


class PrefixTable(Generic[R]):
    """Which keys each replica was sent, the latest last."""

    def __init__(self, most_keys: int = MOST_KEYS) -> None:
        self._most = most_keys
        self._sent: dict[R, OrderedDict[int, None]] = {}

    def matched(self, replica: R, keys: Sequence[int]) -> int:
        """How many leading ones of `keys` `replica` was sent."""
        sent: Mapping[int, None] = self._sent.get(replica, {})
        return next((i for i, key in enumerate(keys) if key not in sent), len(keys))

    def held(self, replica: R) -> int:
        """How many keys of `replica` are remembered."""
        return len(self._sent.get(replica, {}))

    def learn(self, replica: R, keys: Sequence[int]) -> None:
        """`replica` was sent `keys`."""
        sent = self._sent.setdefault(replica, OrderedDict())
        for key in reversed(keys):  # the end of a prompt is forgotten before its beginning, as in vLLM's cache
            sent[key] = None
            sent.move_to_end(key)
        while len(sent) > self._most:
            sent.popitem(last=False)

    def all(self) -> Iterator[tuple[R, tuple[int, ...]]]:
        """Each replica with what it was sent, for another table to learn."""
        for replica, sent in self._sent.items():
            yield replica, tuple(reversed(sent))

    def keep(self, replicas: Collection[R]) -> None:
        """Forget all replicas but these: one that comes back under another name has an empty cache."""
        self._sent = {replica: sent for replica, sent in self._sent.items() if replica in replicas}

    def forget(self, replica: R) -> None:
        """Forget a replica that died."""
        self._sent.pop(replica, None)


def text_of(path: str, fields: dict[str, Any]) -> str:
    """The prompt in a request's body, `fields`; "" if `path` generates nothing."""
    return prompt_text(fields) if path in PROMPTED else ""


def prefix_keys(text: str) -> tuple[int, ...]:
    """A key of 63 bits for each whole piece of `text`, the same in every ingress."""
    keys: list[int] = []
    before = b""
    for start in range(0, min(len(text) // PIECE, MOST_PIECES) * PIECE, PIECE):
        piece = text[start : start + PIECE].encode("utf-8", "surrogatepass")
        before = hashlib.blake2b(before + piece, digest_size=8).digest()
        keys.append(int.from_bytes(before) >> 1)
    return tuple(keys)
