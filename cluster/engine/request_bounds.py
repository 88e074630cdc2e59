"""The bounds of what a request indexes: which of its token ids have no row in the model's embedding.

    token ids, vocabulary --beyond--> the first that has none, or None --refusal--> the sentence of the answer

MLX checks no bounds: such an id reads foreign memory and may end the worker. What a request names in `logit_bias`,
`allowed_token_ids`, `stop_token_ids`, `logprob_token_ids` and `trace_decode_token_ids` vLLM's front end checks against
the model's vocabulary (vllm/sampling_params.py, `verify`); `bad_words` beyond it cannot come and bar nothing. A prompt
it checks against the larger of model and tokenizer (vllm/v1/engine/input_processor.py, `_validate_model_input`), so
that is checked here. Embeddings as prompts and draft tokens are refused at start (admission.py).

A tokenizer with more tokens than the embedding is not refused at start: releases have them and never use them (Gemma 3
1B's brings the image token of its larger siblings). The request that does is.
"""

from collections.abc import Mapping, Sequence


def beyond(token_ids: Sequence[int], vocab_size: int) -> int | None:
    """The first of `token_ids` that is not in 0 .. `vocab_size` - 1."""
    if not token_ids or 0 <= min(token_ids) <= max(token_ids) < vocab_size:
        return None
    return next(token for token in token_ids if not 0 <= token < vocab_size)


def refusal(token: int, vocab_size: int) -> str:
    """What the client is told of the token id `token`."""
    return (
        f"The prompt holds token id {token}, but the model's vocabulary ends at {vocab_size - 1}: leave that token out "
        "of the prompt."
    )


def surplus(vocabulary: Mapping[str, int], vocab_size: int) -> list[str]:
    """The tokens of a tokenizer's `vocabulary` that the model has no row for, by id."""
    found = [(token, piece) for piece, token in vocabulary.items() if token >= vocab_size]
    return [piece for _, piece in sorted(found)]
