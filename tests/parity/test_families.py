"""Every supported family, tiny and random: our paged, ragged forward against mlx-lm's own."""

from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from equality import BOUND, check_tokens, logit_error, reference
from step_driver import Driver
from tiny_models import TINY, build

from pomarium.worker.models.paged import PagedModel, prepare

REQUIRED = (
    "llama", "qwen2", "qwen3", "llama_sliding", "gemma3_text", "gemma2", "phi3", "gpt_oss", "qwen3_moe", "olmo2",
    "granite",
)  # fmt: skip
NEW_TOKENS = 8
PROMPT_LENGTHS = {"one": 1, "short": 5, "block": 16, "long": 43}


def prompts(seed: int = 0) -> dict[str, list[int]]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(3, 120, length).tolist() for name, length in PROMPT_LENGTHS.items()}


@cache
def paged(name: str) -> PagedModel:
    return prepare(build(name), TINY[name]["model_type"])


def test_required_families_are_among_the_tiny_models() -> None:
    assert set(REQUIRED) <= set(TINY)


@pytest.mark.parametrize("name", sorted(TINY))
def test_family_matches_mlx_lm(name: str) -> None:
    """Chunked prompts of four lengths in one batch, then decode: logits at every position, and the tokens."""
    driver = Driver(paged(name), block_size=8)
    tokens = driver.run(prompts(), NEW_TOKENS, chunks=(7, 1, 16, 50))
    ties = 0
    for request, prompt in prompts().items():
        want = reference(paged(name).module, prompt, NEW_TOKENS)
        shared = check_tokens(tokens[request], want)
        ties += shared
        compared = len(prompt) if shared else len(want.logits)
        got = np.stack([driver.recorder.logits[request][position] for position in range(compared)])
        assert logit_error(got, want.logits[:compared]) < BOUND
    print(f"{name}: {ties} near ties in {len(PROMPT_LENGTHS) * NEW_TOKENS} tokens")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "mistral_sliding"])
def test_contiguous_cache_gives_the_same(name: str) -> None:
    """VLLM_METAL_USE_PAGED_ATTENTION=0 is the same model."""
    tokens = Driver(paged(name), paged=False).run(prompts(), NEW_TOKENS, chunks=(7, 1, 16, 50))
    for request, prompt in prompts().items():
        check_tokens(tokens[request], reference(paged(name).module, prompt, NEW_TOKENS))


def test_paged_path_leaves_mlx_lm_untouched() -> None:
    """A model that was made ready for the paged cache still runs mlx-lm's way, as one that was not."""
    tokens = mx.array([prompts()["long"]])
    assert mx.array_equal(paged("llama").module(tokens), build("llama")(tokens))
