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
        prompt_token_ids: the whole prompt.
        output_token_ids: the tokens sampled so far. Ids outside the vocabulary are ignored.
    """

    request_id: str
    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]

    @property
    def position(self) -> int:
        """Index in the sequence of the token to be drawn."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)


class LogitsProcessor(Protocol):
    """The operator's own logits processors, run as one stage on the host."""

    def apply(self, logits: np.ndarray, rows: Sequence[SamplingRow]) -> np.ndarray:
        """New logits, float32 (R, V), for logits float32 (R, V) and their R rows. May write into `logits`."""
        ...
