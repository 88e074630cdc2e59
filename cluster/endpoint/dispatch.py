"""Requests that need no call of Serve's: over a line that a replica keeps open for the ingress (answers.py).

    Ledger.candidates --rank--> the replica that Serve's router would choose --Answers.idle--> Dispatch: a line to it
    it has no idle line here, or owes a sign of life: None; then Serve chooses, calls, and a new line is dialled

A call costs the two processes as much as thirty tokens of a stream, and crosses four threads before the engine hears of
the request. Serve sees no request that goes this way: only engines whose number is fixed get any, since its scaling
counts calls.
"""

from collections.abc import Sequence
from random import Random

from pomarium.cluster.endpoint.answers import Answers, ReplicaLine
from pomarium.cluster.endpoint.ledger import SILENT_S, Entry, Ledger, What
from pomarium.cluster.endpoint.routing import rank


class Dispatch:
    """A request on its way, and what the ledger is told of it.

    Attributes:
        line: that it goes over.
    """

    def __init__(self, ledger: Ledger, deployment: str, line: ReplicaLine, keys: tuple[int, ...]) -> None:
        self.line = line
        self._ledger, self._deployment, self._replica, self._keys = ledger, deployment, line.replica, keys
        self._taken = False
        self._write(What.SENT)

    def taken(self) -> None:
        """The replica has it."""
        self._taken = True
        self._ledger.answered(self._deployment, self._replica)
        if self._keys:
            self._write(What.READ, self._keys)

    def over(self) -> None:
        """It has ended, one way or another; told once."""
        self._write(What.OVER)
        if not self._taken:
            self._ledger.withdrawn(self._deployment, self._replica)

    def _write(self, what: What, keys: tuple[int, ...] = ()) -> None:
        self._ledger.write(Entry(what, self._deployment, self._replica, keys))


def dispatch(
    ledger: Ledger, answers: Answers, deployment: str, keys: tuple[int, ...], random: Random
) -> Dispatch | None:
    """A way for a request whose prompt has `keys`; None if it takes a call."""
    replica = _chosen(ledger, deployment, keys, random)
    if replica is None or ledger.unanswered_s(deployment, replica) > SILENT_S:
        return None
    line = answers.idle(replica)
    return None if line is None else Dispatch(ledger, deployment, line, keys)


def _chosen(ledger: Ledger, deployment: str, keys: Sequence[int], random: Random) -> str | None:
    candidates = ledger.candidates(deployment, ledger.replicas(deployment), keys)
    return next((name for group in rank(candidates, len(keys), random) for name in group), None)
