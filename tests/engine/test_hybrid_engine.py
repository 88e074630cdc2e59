"""A hybrid model through vLLM's engine: specs of attention and states, its block manager, chunks, preemption, prefixes.

Measured against mlx-lm's own forward, token by token; every condition is proved by the engine's own figures.
"""

from pathlib import Path

import numpy as np
import pytest
from engine_process import check_answers, counter, engine
from equality import reference
from hybrid_models import build_hybrid, write_hybrid
from staged_engine import staged
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec

from pomarium.worker.parity import Reference

pytestmark = pytest.mark.e2e

NAME = "qwen3_next"
LENGTHS = (33, 7, 100, 1, 70, 16)
NEW_TOKENS = 24
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
NO_PREFIXES = {"enable_prefix_caching": False}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hybrid(NAME, tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def wanted() -> list[Reference]:
    model, random = build_hybrid(NAME), np.random.default_rng(3)
    return [reference(model, random.integers(3, 120, length).tolist(), NEW_TOKENS) for length in LENGTHS]


@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_states_and_attention_get_blocks_of_one_size(
    checkpoint: Path, wanted: list[Reference], block_size: int
) -> None:
    """One of vLLM's blocks is no smaller than a state, and the pool keeps blocks of the size asked for."""
    with engine(checkpoint, block_size=block_size, **NO_PREFIXES) as llm:
        core = llm.llm_engine.engine_core.engine_core
        specs = [group.kv_cache_spec for group in core.scheduler.kv_cache_config.kv_cache_groups]
        assert [type(spec) for spec in specs] == [FullAttentionSpec, MambaSpec, MambaSpec]
        assert len({spec.page_size_bytes for spec in specs}) == 1
        assert specs[0].block_size > block_size
        assert specs[0].block_size % block_size == 0
        check_answers(llm, wanted, GREEDY)


def test_chunked_prompts(checkpoint: Path, wanted: list[Reference]) -> None:
    with engine(checkpoint, max_num_batched_tokens=16, **NO_PREFIXES) as llm:
        check_answers(llm, wanted, GREEDY)


def test_preempted_requests_compute_their_states_again(checkpoint: Path, wanted: list[Reference]) -> None:
    """Twelve blocks beside vLLM's placeholder: room for four requests, until each needs a second for attention."""
    scarce = {"num_gpu_blocks_override": 13, "block_size": 8, "max_model_len": 128}
    crossing = [want for want in wanted if 64 < len(want.prompt) < 88]
    assert len(crossing) == 1
    with engine(checkpoint, **scarce, **NO_PREFIXES) as llm:
        check_answers(llm, crossing * 4, GREEDY)
        assert counter(llm, "vllm:num_preemptions") > 0


@pytest.mark.parametrize("budget", [256, 40])
def test_cached_prefixes(checkpoint: Path, wanted: list[Reference], budget: int) -> None:
    """vLLM's mode "align": the second time, the states at block boundaries are found again; chunks end at them."""
    with engine(checkpoint, enable_prefix_caching=True, block_size=8, max_num_batched_tokens=budget) as llm:
        assert llm.llm_engine.vllm_config.cache_config.mamba_cache_mode == "align"
        assert check_answers(llm, wanted, GREEDY) == [0] * len(wanted)
        assert max(check_answers(llm, wanted, GREEDY)) >= 88


def test_contiguous_cache(checkpoint: Path, wanted: list[Reference]) -> None:
    with engine(checkpoint, {"VLLM_METAL_USE_PAGED_ATTENTION": "0"}) as llm:
        check_answers(llm, wanted, GREEDY)


@pytest.mark.parametrize("bounds", [[0, 3, 6], list(range(7))], ids=["two stages", "one layer each"])
@pytest.mark.parametrize("prefixes", [True, False])
def test_stages(checkpoint: Path, wanted: list[Reference], bounds: list[int], prefixes: bool) -> None:
    """Stages with layers of both kinds, and with one layer that only attends or only keeps a state."""
    with staged(checkpoint, bounds, enable_prefix_caching=prefixes, block_size=8) as (llm, _):
        check_answers(llm, wanted, GREEDY)
        assert (max(check_answers(llm, wanted, GREEDY)) >= 88) == prefixes
