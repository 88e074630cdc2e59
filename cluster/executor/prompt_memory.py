"""Where a prompt left what the cache knew: the first token that differed, and what had been known and is gone.

    token ids of a prompt, how many of them the cache had --PromptMemory.compared--> Compared

vLLM tells how many tokens of a prompt its cache had, in whole blocks, and not why no more. The last prompts are kept
here, as token ids: where a prompt has more in common with one of them than the cache had, blocks were evicted; else it
differs there. Of an agent's session that says whether its client changes what it sent before, or memory is short.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_PROMPTS = 64
MOST_TOKENS = 1 << 20
"""Prompts that are kept, and tokens of them all (4 MiB); the oldest goes first."""


@dataclass(frozen=True)
class Compared:
    """A prompt beside those before it.

    Attributes:
        tokens: of the prompt. cached: of these, found in the cache.
        differs_at: index of the first token that differed from what was cached or asked before; `tokens` if none did.
        evicted: tokens that an earlier prompt had, too, and that the cache should have and had not, in whole blocks.
    """

    tokens: int
    cached: int
    differs_at: int
    evicted: int


class PromptMemory:
    """The last prompts of one engine. `block`: tokens of a block of its cache."""

    def __init__(self, block: int) -> None:
        self._block = block
        self._prompts: OrderedDict[bytes, npt.NDArray[np.int32]] = OrderedDict()
        self._tokens = 0

    def compared(self, tokens: Sequence[int], cached: int) -> Compared:
        """A prompt that is computed now, which is kept from now on. cached: of its tokens, found in the cache."""
        prompt = np.asarray(tokens, np.int32)
        known = max((_common(prompt, other) for other in self._prompts.values()), default=0)
        self._keep(prompt)
        # vLLM computes the last token again, whatever it knows, and with it its block.
        whole = min(known, max(0, len(prompt) - 1)) // self._block * self._block
        return Compared(len(prompt), cached, max(known, cached), max(0, whole - cached))

    def _keep(self, prompt: npt.NDArray[np.int32]) -> None:
        name = prompt.tobytes()
        if name in self._prompts:
            self._prompts.move_to_end(name)
            return
        self._prompts[name] = prompt
        self._tokens += len(prompt)
        while len(self._prompts) > MOST_PROMPTS or (self._tokens > MOST_TOKENS and len(self._prompts) > 1):
            self._tokens -= len(self._prompts.popitem(last=False)[1])


def _common(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """Tokens that both begin with."""
    length = min(len(one), len(other))
    unlike = one[:length] != other[:length]
    first = int(unlike.argmax()) if length else 0
    return first if length and unlike[first] else length
