"""The sampled tokens on a stage that does not sample: places are kept for them, and on the first stage they are filled.

    step n computed --expect--> a 0 at the end of each sampler's tokens
    before step m > n of one of these requests --settle--> the tokens of step n, from the last stage, in their places

The scheduler plans step m before it has seen the tokens of step n, so they come from the last stage directly. Stages in
between never look at a token: they keep the places, which is all that positions need.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pomarium.worker.requests import RequestState

Receive = Callable[[int], list[int]]
"""Step -> its sampled tokens, in the order of its samplers; waits for them."""


@dataclass(frozen=True)
class _Expected:
    """Tokens of one step that are not here yet: for each sampler its list of tokens, and the place in it.

    The lists are kept and not the requests: one that is preempted and comes back gets a new list, whole, and what
    arrives for the old one is written where nobody looks.
    """

    step: int
    places: tuple[tuple[list[int], int], ...]


class ReturnedTokens:
    """Places for the tokens of steps under way.

    Args:
        receive: None on a stage that never looks at tokens.
        depth: steps that can be under way at once; what is older has been sampled, so that waiting for it is short.
    """

    def __init__(self, receive: Receive | None, depth: int) -> None:
        self._receive = receive
        self._depth = depth
        self._expected: deque[_Expected] = deque()

    def expect(self, step: int, samplers: Sequence[RequestState]) -> None:
        """Keep a place at the end of each sampler's tokens."""
        for request in samplers:
            request.token_ids.append(0)
        if self._receive is not None and samplers:
            places = tuple((request.token_ids, len(request.token_ids) - 1) for request in samplers)
            self._expected.append(_Expected(step, places))

    def settle(self, step: int, scheduled: Iterable[RequestState]) -> None:
        """Fill in what the requests of `step`, about to be computed, need; and whatever is older than `depth` steps."""
        if self._receive is None:
            return
        needed = {id(request.token_ids) for request in scheduled}
        due = step - self._depth
        for expected in self._expected:
            if any(id(tokens) in needed for tokens, _ in expected.places):
                due = max(due, expected.step)
        while self._expected and self._expected[0].step <= due:
            arrived = self._expected.popleft()
            for (tokens, place), token in zip(arrived.places, self._receive(arrived.step), strict=True):
                tokens[place] = token
