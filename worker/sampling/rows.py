"""What a row of logits brings along to be sampled, and who else may change the logits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.worker.sampling.occurrences import Occurrences
from pomarium.worker.sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplingRow:
    """One row of logits: the request it belongs to and the tokens before it.

    Attributes:
        token_ids: the whole prompt, then the tokens sampled so far; ids outside the vocabulary are ignored. Often the
            request's own list, which grows when this row has been sampled. The last one may be -1 - i: token i of the
            step before, which is still on the device.
        occurrences: what is counted so far of `token_ids`; one object for all rows of a request, for speed.
    """

    request_id: str
    params: SamplingParams
    token_ids: Sequence[int]
    num_prompt_tokens: int
    occurrences: Occurrences = field(default_factory=Occurrences, compare=False)

    @property
    def position(self) -> int:
        """Index in the sequence of the token to be drawn."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def late(self) -> int | None:
        """i, where the last token is token i of the step before; None if it is known."""
        last = self.token_ids[-1] if self.token_ids else 0
        return -1 - last if last < 0 else None

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


def late_tokens(rows: Sequence[SamplingRow], unread: mx.array | None) -> mx.array | None:
    """Each row's last token where it is still on the device, else -1: int32 (R,), lazily; None if all are known.

    Args:
        unread: the tokens of the step before, int32 (S,).

    Raises:
        ValueError: a row's last token is unknown and `unread` is not given.
    """
    late = [row.late for row in rows]
    if all(index is None for index in late):
        return None
    if unread is None:
        raise ValueError("a token of the step before is not known")
    index = mx.array([index or 0 for index in late])
    return mx.where(mx.array([index is not None for index in late]), unread[index], -1)
