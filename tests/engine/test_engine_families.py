"""Model families through vLLM's engine: KV cache specs, groups and layout, for each block size.

Measured against mlx-lm's own forward: the whole distribution at every position of the prompt (teacher-forced, as
vLLM's prompt log-probabilities), and free-running greedy tokens.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from engine_process import engine, generate, log_softmax, logprob_table, tokens_of
from equality import BOUND, check_tokens, logit_error, reference
from tiny_models import FULL, VOCAB_SIZE, build, write_checkpoint
from tiny_models import SLIDING as WINDOWED
from vllm import LLM, SamplingParams

from pomarium.worker.parity import Reference

pytestmark = pytest.mark.e2e

FAMILIES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral_sliding",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "qwen3_moe",
    "olmo2",
    "granite",
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "minicpm3",
)
SLIDING = ("gemma3_text", "gpt_oss", "mistral_sliding")
LENGTHS = (1, 21, 70)
NEW_TOKENS = 10
DISTRIBUTION = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@cache
def references(name: str) -> list[Reference]:
    """mlx-lm's continuations of random prompts, of all `LENGTHS`."""
    model, random = build(name), np.random.default_rng(3)
    return [reference(model, random.integers(3, 120, length).tolist(), NEW_TOKENS) for length in LENGTHS]


def checkpoint(name: str, folder: Path) -> Path:
    directory = folder / name
    return directory if directory.exists() else write_checkpoint(name, directory)


def check(llm: LLM, wanted: Sequence[Reference]) -> int:
    """Assert that the engine computes what mlx-lm does; return the number of near ties."""
    forced = [(*want.prompt, *want.tokens[:-1]) for want in wanted]
    for output, want in zip(generate(llm, forced, DISTRIBUTION), wanted, strict=True):
        positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        got = logprob_table(positions, VOCAB_SIZE)
        assert logit_error(got, log_softmax(want.logits)) < BOUND
    answers = generate(llm, [want.prompt for want in wanted], GREEDY)
    return sum(check_tokens(tokens_of(answer), want) for answer, want in zip(answers, wanted, strict=True))


OTHER_BLOCKS = ("llama", "gemma3_text", "gpt_oss", "deepseek_v3")
"""Families that always run with blocks of 8 and 32 tokens, too."""
CASES = [
    pytest.param(name, size, marks=() if size == 16 or name in OTHER_BLOCKS else pytest.mark.full, id=f"{name}-{size}")
    for name in FAMILIES
    for size in (8, 16, 32)
]


@pytest.mark.parametrize(("name", "block_size"), CASES)
def test_family_computes_what_mlx_lm_does(name: str, block_size: int, folder: Path) -> None:
    with engine(checkpoint(name, folder), block_size=block_size, max_logprobs=-1) as llm:
        assert llm.llm_engine.vllm_config.cache_config.block_size == block_size
        near_ties = check(llm, references(name))
    print(f"{name}, blocks of {block_size}: {near_ties} near ties in {len(LENGTHS)} continuations")


@pytest.mark.parametrize("hybrid", [True, False])
@pytest.mark.parametrize("name", SLIDING)
def test_hybrid_cache_on_and_off(name: str, hybrid: bool, folder: Path) -> None:
    """Full and sliding layers in groups of their own, or in one group whose blocks all last as long."""
    with engine(checkpoint(name, folder), disable_hybrid_kv_cache_manager=not hybrid, max_logprobs=-1) as llm:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        assert (len(groups) > 1) is hybrid
        check(llm, references(name))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_contiguous_cache_computes_the_same(name: str, folder: Path) -> None:
    with engine(checkpoint(name, folder), {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}, max_logprobs=-1) as llm:
        check(llm, references(name))


UNEVEN = {"num_hidden_layers": 7, "layer_types": [WINDOWED, WINDOWED, WINDOWED, FULL, WINDOWED, WINDOWED, FULL]}


@pytest.mark.parametrize(
    ("name", "changes", "most"),
    [("llama", {}, 256 // 16 + 1), ("llama_sliding", UNEVEN, 7 * 256 // 16)],
    ids=["one group", "groups that vLLM pads"],
)
def test_a_pool_is_as_large_as_its_sequences_can_use(
    name: str, changes: dict[str, object], most: int, folder: Path
) -> None:
    """One sequence of maximum length runs to its end in it, and the CPU's 2 GiB are left alone."""
    directory = write_checkpoint(name, folder / f"{name}-alone", **changes)
    wanted = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)
    with engine(directory, kv_cache_memory_bytes=None, max_num_seqs=1, max_num_batched_tokens=64) as llm:
        config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        assert 256 // 16 < config.num_blocks <= most
        (answer,) = generate(llm, [[5] * 56], wanted)
        assert len(tokens_of(answer)) == 200
