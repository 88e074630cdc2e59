"""Sampling parameters of one request, as the worker needs them: vLLM's SamplingParams, resolved by its front end.

Stop strings, `n`, `best_of`, `detokenize` and the like never reach a worker: the engine acts on them. What is left is
what changes which token is drawn or which log-probabilities are reported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

GREEDY_TEMPERATURE = 1e-5
"""Below this vLLM samples greedily (vllm/v1/sample/sampler.py, _SAMPLING_EPS)."""


@dataclass(frozen=True)
class SamplingParams:
    """Names and ranges are vLLM's (vllm/sampling_params.py); defaults change nothing.

    Attributes:
        seed: 64-bit seed of the request; the worker gives requests without one a seed of their own.
        top_k: 0 keeps every token.
        stop_token_ids: every id that ends the request (eos included), which `min_tokens` holds back.
        bad_words: token sequences that must not appear; the last token is barred when the rest precedes it.
        num_logprobs: None reports nothing, k the sampled token and the k most likely, -1 the whole vocabulary.
        num_prompt_logprobs: the same for each prompt token.
        logprob_token_ids: report exactly these tokens' log-probabilities instead of the most likely.
        extra_args: handed unread to custom logits processors.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] | None = None
    extra_args: Mapping[str, Any] | None = None

    @property
    def greedy(self) -> bool:
        """True if the most likely token is taken."""
        return self.temperature < GREEDY_TEMPERATURE
