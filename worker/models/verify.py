"""A check on a model's own weights, for families that the parity tests do not cover: rows against mlx-lm's own forward.

    tokens, or on a later stage made-up hidden states --mlx-lm's own forward--> logits or hidden states
                                                      --rows, paged pool-----> the same, within a bound

Some models pass the dry run of `paged.prepare` and would still be wrong (a mask of their own, a position used elsewhere
than in RoPE). Two dozen tokens in two chunks through a small pool tell; it costs two small forward passes at start.
A stage is checked by itself: over its own layers, on hidden states that are made up where it does not see tokens.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from pomarium.worker import parity
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.hybrid import EagerStateBackend, HybridBackend
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import StatePool, single_group_states
from pomarium.worker.models.paged import WAY_OUT, PagedModel, StageModel
from pomarium.worker.models.stages import Passage

PROVEN = frozenset({
    "apertus", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5", "exaone4", "gemma", "gemma2",
    "gemma3_text", "gemma4", "gemma4_text", "glm", "glm4", "glm4_moe_lite", "gpt_neox", "gpt_oss", "granite",
    "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama", "mimo", "minicpm3", "ministral3", "mistral",
    "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "youtu_llm",
})  # fmt: skip
"""Model types of tests/parity/test_families.py, and Gemma 4's of test_wrappers.py."""

CHUNKS = (17, 7)
BLOCK_SIZE = 16

Run = Callable[[Batch, StepAttention], mx.array]
"""Outputs of all rows of a batch."""


def verify(model: PagedModel, model_type: str) -> None:
    """Compare logits at every position of a fixed pseudo-random text.

    Raises:
        UnsupportedError: names `model_type`, the difference and the flag to change.
    """
    length = sum(CHUNKS)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, length).astype(np.int32)
    want = np.array(model.module(mx.array(tokens)[None])[0].astype(mx.float32))

    def run(batch: Batch, attention: StepAttention) -> mx.array:
        return model(batch.token_ids, batch.positions, attention, batch.logit_rows)

    _compare(_in_chunks(model, tokens, run), want, model.dtype, model_type)


def verify_stage(stage: StageModel, model_type: str) -> None:
    """As `verify`, of one stage: the outputs of its layers, or the logits of the last, at every position.

    Raises:
        UnsupportedError: as `verify`.
    """
    rng, length = np.random.default_rng(0), sum(CHUNKS)
    tokens = rng.integers(0, stage.vocab_size, length).astype(np.int32)
    made_up = mx.array(rng.standard_normal((length, stage.hidden_size)), stage.received or mx.float32)
    passage = Passage(stage.cut, None if stage.cut.has_embedding else made_up[None], stage.beside)
    with stage.hooks.visited_by(passage):
        output = stage.module(mx.array(tokens)[None], cache=make_prompt_cache(stage.module))
    handed_on = output if stage.cut.has_head else passage.handed_on
    assert handed_on is not None  # the dry run of prepare_stage saw every layer run
    want = np.array(handed_on[0].astype(mx.float32))

    def run(batch: Batch, attention: StepAttention) -> mx.array:
        inputs = batch.token_ids if stage.cut.has_embedding else made_up[mx.array(batch.positions)]
        return stage(inputs, batch.positions, attention, batch.logit_rows)

    _compare(_in_chunks(stage, tokens, run), want, stage.dtype, model_type)


def _in_chunks(model: PagedModel | StageModel, tokens: np.ndarray, run: Run) -> np.ndarray:
    layout = single_group_layout(model.layers, BLOCK_SIZE, 8)
    attention = GatheredAttention(PagedPool(layout, model.dtype))
    states = StatePool(single_group_states(model.states, sum(CHUNKS), 2, len(layout.groups)))
    backend = HybridBackend(attention, EagerStateBackend(states))
    tables = (*((2 * group.table + 2, 2 * group.table + 1) for group in layout.groups), (1,))
    got, start = [], 0
    for count in CHUNKS:
        rows, end = np.arange(count, dtype=np.int32), start + count
        positions = np.arange(start, end, dtype=np.int32)
        batch = Batch((Sequence("check", start, count, tables),), tokens[start:end], positions, rows, rows, (), {})
        output = run(batch, backend.prepare(batch)).astype(mx.float32)
        mx.eval(output, backend.arrays)
        got.append(np.array(output))
        start = end
    return np.concatenate(got)


def _compare(got: np.ndarray, want: np.ndarray, dtype: mx.Dtype, model_type: str) -> None:
    error = parity.logit_error(got, want)
    bound = 5 * parity.FLOAT32_BOUND if dtype == mx.float32 else parity.HALF_BOUND
    if not error <= bound:
        raise UnsupportedError(
            f"model type {model_type!r} gives other results on the paged KV cache than mlx-lm (relative difference "
            f"{error:.1e}, bound {bound:.0e}); {WAY_OUT}"
        )
