"""What a step of the engine asks of the worker, and what the worker answers: plain facts, free of vLLM.

    vLLM SchedulerOutput --step_of--> Step --model_runner--> StepResult --output_of--> vLLM ModelRunnerOutput

`vllm_translation` makes them from vLLM's classes and back; everything below it reads these. Token ids and block ids are
Python ints on the host; logits and K/V never appear here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pomarium.worker.pictures import Picture
from pomarium.worker.sampling_params import SamplingParams

BlockTables = tuple[tuple[int, ...], ...]
"""Block ids of one request, one tuple per KV-cache group."""


@dataclass(frozen=True)
class NewRequest:
    """A request that this worker has not seen, or that comes back after it was preempted and forgotten.

    Attributes:
        token_ids: every known token: the prompt, then outputs already sampled (when it comes back).
        num_prompt_tokens: how many of `token_ids` are prompt.
        num_computed_tokens: how many leading tokens already have K/V in the blocks (a prefix-cache hit).
        pictures: the images of its prompt, by their place in it.
    """

    id: str
    token_ids: tuple[int, ...]
    num_prompt_tokens: int
    num_computed_tokens: int
    block_ids: BlockTables
    sampling: SamplingParams
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class CachedRequest:
    """A request that this worker holds.

    Attributes:
        new_block_ids: blocks to append, or, if `resumed`, the whole new tables; None if there are none.
        token_ids: only if `resumed`: every known token, which replaces what the worker holds.
    """

    id: str
    num_computed_tokens: int
    new_block_ids: BlockTables | None
    resumed: bool = False
    token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Step:
    """One scheduled step: request id -> number of tokens, and what changed since the last one.

    Attributes:
        unseen: images whose embeddings this step is the first to need: key -> tiles uint8 (N, 3, side, side).
        forgotten: keys of images whose embeddings no step will need, before this one is computed.
    """

    num_scheduled_tokens: Mapping[str, int]
    new: tuple[NewRequest, ...] = ()
    cached: tuple[CachedRequest, ...] = ()
    finished: frozenset[str] = frozenset()
    unseen: Mapping[str, np.ndarray] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Grammar:
    """Which tokens a structured-output grammar admits next.

    Attributes:
        bitmask: request id -> uint32 (ceil(vocab / 32),), bit b of word w set when token 32*w + b is allowed.
    """

    bitmask: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Logprobs:
    """Log-probabilities of N positions. Column 0 is the token itself, the others the most likely in order.

    Attributes:
        token_ids: int32 (N, 1 + k). logprobs: float32 (N, 1 + k). ranks: int64 (N,), 1 for the most likely token.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    ranks: np.ndarray


@dataclass(frozen=True)
class StepResult:
    """What came of a step, in the order of `Step.num_scheduled_tokens`.

    Attributes:
        token_ids: for each request the sampled tokens: one, or none while its prompt is not yet through.
        logprobs: for the requests that sampled, in order and all of one width; None if nobody asked. Rows of requests
            that asked for fewer (or none) carry more than they need.
        prompt_logprobs: request id -> its prompt's log-probabilities, positions 1..num_prompt_tokens-1 (the first token
            has none), in the step that samples its first token.
    """

    request_ids: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    logprobs: Logprobs | None = None
    prompt_logprobs: Mapping[str, Logprobs] = field(default_factory=dict)

    def read(self) -> "StepResult":
        """Itself: see model_runner.UnreadStep."""
        return self
