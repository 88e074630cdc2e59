"""Multimodal releases through vLLM's engine as text models: what vLLM sees of them, and what it computes.

Measured against mlx-lm's own forward, token by token: Gemma 4 with windows, heads of two sizes and shared K and V, and
Qwen3.5's wrappers with FP8 weights.
"""

from pathlib import Path

import mlx.nn as nn
import numpy as np
import pytest
from engine_process import check_answers, counter, engine, generate, log_softmax, logprob_table
from equality import BOUND, logit_error, reference
from mlx_lm.utils import load_model
from staged_engine import staged
from tiny_models import VOCAB_SIZE
from vllm import SamplingParams
from wrapper_models import WRAPPED, build_text, release

from pomarium.worker.errors import PomariumError, UnsupportedError
from pomarium.worker.parity import Reference

pytestmark = pytest.mark.e2e

LENGTHS = (33, 7, 100, 1, 70, 16)
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
DISTRIBUTION = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, detokenize=False)
MODE = "VLLM_METAL_MULTIMODAL_MODE"
FP8 = (16, 16)
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5Erk"
    "Jggg=="
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wrappers")


def wanted(name: str, blocks: tuple[int, int] | None, folder: Path) -> list[Reference]:
    """mlx-lm's continuations of random prompts."""
    model: nn.Module = build_text(name) if blocks is None else load_model(release(name, blocks, folder) / "dense")[0]
    random = np.random.default_rng(3)
    return [reference(model, random.integers(3, 120, length).tolist(), NEW_TOKENS) for length in LENGTHS]


ALWAYS = (("gemma4_small", None), ("gemma4_dense", None), ("qwen3_5", FP8), ("qwen3_5_moe", FP8))
CASES = [
    *(pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in ALWAYS),
    *(pytest.param(name, None, marks=pytest.mark.full) for name in WRAPPED if (name, None) not in ALWAYS),
]


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_a_release_is_served_as_a_text_model(name: str, blocks: tuple[int, int] | None, folder: Path) -> None:
    """Twice, the second time from cached prefixes, in chunks; whole distributions of one prompt."""
    references = wanted(name, blocks, folder)
    arguments = {"max_num_batched_tokens": 32, "block_size": 8, "max_logprobs": -1}
    with engine(release(name, blocks, folder), **arguments) as llm:
        llm.llm_engine.vllm_config.__post_init__()  # as an engine in a process of its own does once it is set up
        assert check_answers(llm, references, GREEDY) == [0] * len(LENGTHS)
        assert max(check_answers(llm, references, GREEDY)) >= 88
        want = references[0]
        output = generate(llm, [(*want.prompt, *want.tokens[:-1])], DISTRIBUTION)[0]
        positions = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        assert logit_error(logprob_table(positions, VOCAB_SIZE), log_softmax(want.logits)) < BOUND


@pytest.mark.parametrize("block_size", [16, pytest.param(32, marks=pytest.mark.full)])
@pytest.mark.parametrize("hybrid", [True, False])
def test_heads_of_two_sizes_get_pages_of_one(folder: Path, hybrid: bool, block_size: int) -> None:
    """Half as wide, twice the tokens per block; or one group in which each layer has an address of its own."""
    arguments = {"block_size": block_size, "disable_hybrid_kv_cache_manager": not hybrid}
    with engine(release("gemma4_small", None, folder), **arguments) as llm:
        groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
        sizes = [(len(group.layer_names), group.kv_cache_spec.block_size) for group in groups]
        assert sizes == ([*[(1, 2 * block_size)] * 3, (1, block_size)] if hybrid else [(4, block_size)])
        check_answers(llm, wanted("gemma4_small", None, folder), GREEDY)


def test_preempted_requests_compute_their_keys_again(folder: Path) -> None:
    references = [want for want in wanted("gemma4_small", None, folder) if len(want.prompt) == 33]
    scarce = {"num_gpu_blocks_override": 38, "block_size": 8, "max_model_len": 128, "max_num_batched_tokens": 32}
    with engine(release("gemma4_small", None, folder), enable_prefix_caching=False, **scarce) as llm:
        check_answers(llm, references * 4, GREEDY)
        assert counter(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize("name", ["gemma4_small", pytest.param("qwen3_5", marks=pytest.mark.full)])
def test_contiguous_cache(name: str, folder: Path) -> None:
    with engine(release(name, None, folder), {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}) as llm:
        check_answers(llm, wanted(name, None, folder), GREEDY)


@pytest.mark.parametrize(
    ("name", "blocks", "bounds"),
    [
        ("gemma4_dense", None, [0, 2, 3, 6]),
        ("qwen3_5", FP8, [0, 3, 6]),
        pytest.param("gemma4_moe", None, [0, 3, 6], marks=pytest.mark.full),
    ],
)
def test_stages(name: str, blocks: tuple[int, int] | None, bounds: list[int], folder: Path) -> None:
    """Stages with layers of both sizes of heads, and of one."""
    references = wanted(name, blocks, folder)
    with staged(release(name, blocks, folder), bounds, block_size=8) as (llm, _):
        check_answers(llm, references, GREEDY)
        assert max(check_answers(llm, references, GREEDY)) >= 88


def test_shared_keys_in_stages_are_refused_by_name(folder: Path) -> None:
    refusal = pytest.raises(PomariumError, match=r"'gemma4' cannot be cut into stages: .*; serve it with one stage")
    with refusal, staged(release("gemma4_small", None, folder), [0, 4, 8]):
        pass


def test_an_image_gets_one_error_and_harms_nobody(folder: Path) -> None:
    references = wanted("gemma4_small", None, folder)
    image = {"type": "image_url", "image_url": {"url": PIXEL}}
    with engine(release("gemma4_small", None, folder), {MODE: "text-only-compat"}) as llm:
        with pytest.raises(ValueError, match="is not a multimodal model"):
            llm.chat([{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}], GREEDY)
        with pytest.raises(ValueError, match="text-only models"):
            llm.generate({"prompt": "What is this?", "multi_modal_data": {"image": PIXEL}}, GREEDY)
        check_answers(llm, references, GREEDY)


@pytest.mark.parametrize("name", ["gemma4_small", "qwen3_5"])
def test_native_images_are_refused(name: str, folder: Path) -> None:
    refusal = pytest.raises(UnsupportedError, match=f"{MODE}=multimodal-native .* auto or text-only-compat")
    with refusal, engine(release(name, None, folder), {MODE: "multimodal-native"}):
        pass
