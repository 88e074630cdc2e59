"""How often each token occurs in a request, counted once: a step adds its token, however long the prompt is.

    tokens that are known and not yet counted --Occurrences.take--> distinct tokens and their counts so far

To make an array of a prompt of 32,000 tokens and sort it takes 2 ms, which a penalised request would pay in each step.
"""

from collections.abc import Sequence

import numpy as np

FIRST_ROOM = 256


class Occurrences:
    """Of one list of tokens, which only grows; the last one may not be known yet (SamplingRow.token_ids)."""

    def __init__(self) -> None:
        self._counted = 0
        self._places: dict[int, int] = {}
        self._tokens = np.empty(FIRST_ROOM, np.int32)
        self._counts = np.empty(FIRST_ROOM, np.float32)

    def take(self, token_ids: Sequence[int], first: int, num_prompt_tokens: int, vocab_size: int) -> None:
        """Count what is new of `token_ids`: not before `first`, each in the prompt as 0 times, none outside [0,
        vocab_size). All but `token_ids` are those of the calls before."""
        end = len(token_ids)
        while end > self._counted and token_ids[end - 1] < 0:
            end -= 1
        for position in range(max(first, self._counted), end):
            if token_ids[position] < vocab_size:
                self._counts[self._place(token_ids[position])] += position >= num_prompt_tokens
        self._counted = end

    @property
    def tokens(self) -> np.ndarray:
        """int32 (n,), distinct."""
        return self._tokens[: len(self._places)]

    @property
    def counts(self) -> np.ndarray:
        """Occurrences of each in the output, float32 (n,)."""
        return self._counts[: len(self._places)]

    def _place(self, token: int) -> int:
        place = self._places.get(token)
        if place is None:
            place = self._places[token] = len(self._places)
            if place == len(self._tokens):
                self._tokens, self._counts = (
                    np.concatenate([a, np.empty_like(a)]) for a in (self._tokens, self._counts)
                )
            self._tokens[place], self._counts[place] = token, 0
        return place
