"""What a row of logits brings along to be sampled, and who else may change the logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from pomarium.worker.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits: the request it belongs to and the tokens before it.

    Attributes:
        token_ids: the whole prompt, then the tokens sampled so far; ids outside the vocabulary are ignored. Often the
            request's own list, which grows when this row has been sampled.
    """

    request_id: str
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int

    @property
    def position(self) -> int:
        """Index in the sequence of the token to be drawn."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> Sequence[int]:
        """A copy: few stages look at tokens, and not for each row."""
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> Sequence[int]:
        """A copy, likewise."""
        return self.token_ids[self.num_prompt_tokens :]


class LogitsProcessor(Protocol):
    """The operator's own logits processors, run as one stage on the host."""

    def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
        """New logits, float32 (R, V), for logits float32 (R, V) and their R rows. May write into `logits`."""
        ...
