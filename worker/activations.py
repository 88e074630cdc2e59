"""How much memory the arrays of one step take beside weights and KV cache: a pure estimate, from above."""

from collections.abc import Mapping
from typing import Any

GATHERED_KV_BYTES = 256 << 20
"""The bound that attention.tiles.MAX_KEYS puts on the copied K and V of a bundle."""

LIVE_ARRAYS = 6
"""Arrays of a layer's widest kind that are alive at once: gate, up, their product, the residual, and MLX's spares."""


def layer_width(text: Mapping[str, Any], hidden_size: int) -> int:
    """Elements per token of a layer's widest array: the MLP's, or in models of experts alone those of a token together.

    Args:
        text: config.json, or its `text_config` where it has one.
    """
    if dense := text.get("intermediate_size") or text.get("n_inner"):
        return int(dense) * (2 if text.get("use_double_wide_mlp") else 1)
    if experts := text.get("moe_intermediate_size"):
        return int(text.get("num_experts_per_tok") or 1) * int(experts)
    return 4 * hidden_size


def activation_bytes(
    *, rows: int, sampled: int, hidden_size: int, intermediate_size: int, vocab_size: int, itemsize: int
) -> int:
    """Bytes that a step of `rows` tokens, `sampled` of them sampled, needs at most for its temporary arrays.

    Logits are float32 in the sampler, which holds a few copies of them.
    """
    layer = rows * max(hidden_size, intermediate_size) * itemsize * LIVE_ARRAYS
    logits = sampled * vocab_size * 4 * 4
    return layer + logits + GATHERED_KV_BYTES
