"""A check on a model's own weights, for families that the parity tests do not cover: rows against mlx-lm's own forward.

Some models pass the dry run of `paged.prepare` and would still be wrong (a mask of their own, a position used elsewhere
than in RoPE). Two dozen tokens in two chunks through a small pool tell; it costs two small forward passes at start.
"""

import mlx.core as mx
import numpy as np

from pomarium.worker import parity
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.paged import WAY_OUT, PagedModel

PROVEN = frozenset({
    "apertus", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "gpt_neox",
    "gpt_oss", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "llama", "mimo", "ministral3",
    "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
"""Model types of tests/parity/test_families.py."""

CHUNKS = (17, 7)
BLOCK_SIZE = 16


def verify(model: PagedModel, model_type: str) -> None:
    """Compare logits at every position of a fixed pseudo-random text.

    Raises:
        UnsupportedError: names `model_type`, the difference and the flag to change.
    """
    length = sum(CHUNKS)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, length).astype(np.int32)
    want = np.array(model.module(mx.array(tokens)[None])[0].astype(mx.float32))
    layout = single_group_layout(model.layers, BLOCK_SIZE, 8)
    backend = GatheredAttention(PagedPool(layout, model.dtype))
    tables = tuple((2 * group.table + 2, 2 * group.table + 1) for group in layout.groups)
    got, start = [], 0
    for count in CHUNKS:
        rows, end = np.arange(count, dtype=np.int32), start + count
        positions = np.arange(start, end, dtype=np.int32)
        batch = Batch((Sequence("check", start, count, tables),), tokens[start:end], positions, rows, rows, (), {})
        logits = model(batch.token_ids, positions, backend.prepare(batch), rows).astype(mx.float32)
        mx.eval(logits, backend.arrays)
        got.append(np.array(logits))
        start = end
    error = parity.logit_error(np.concatenate(got), want)
    bound = 5 * parity.FLOAT32_BOUND if model.dtype == mx.float32 else parity.HALF_BOUND
    if not error <= bound:
        raise UnsupportedError(
            f"model type {model_type!r} gives other logits on the paged KV cache than mlx-lm (relative difference "
            f"{error:.1e}, bound {bound:.0e}); {WAY_OUT}"
        )
