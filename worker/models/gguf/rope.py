"""RoPE scaling of a GGUF file -> `rope_scaling` of config.json, or a refusal.

llama.cpp writes linear and YaRN scaling as metadata; Llama 3's as a tensor of per-frequency divisors
(`rope_freqs.weight`, head_dim / 2), from which the four published parameters are recovered and checked.
"""

import math
from typing import Any

import numpy as np

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.gguf.metadata import Metadata

_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192
_YARN_REFUSED = {"yarn_ext_factor": 1.0, "attn_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}


def rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """What `<arch>.rope.scaling.*` (or the older `rope.scale_linear`) says; None for plain RoPE."""
    kind = metadata.optional(metadata.own("rope.scaling.type"), str) or "none"
    factor = metadata.optional(metadata.own("rope.scaling.factor"), float)
    if factor is None:
        factor = metadata.optional(metadata.own("rope.scale_linear"), float)
        kind = "linear" if factor is not None and kind == "none" else kind
    if factor is None or kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UnsupportedError(f"{metadata.path}: RoPE scaling {kind!r} is not supported (only linear and yarn).")
    return _yarn(metadata, factor)


def _yarn(metadata: Metadata, factor: float) -> dict[str, Any]:
    for key, neutral in _YARN_REFUSED.items():
        value = metadata.optional(metadata.own(f"rope.scaling.{key}"), float)
        if value is not None and value != neutral:
            raise UnsupportedError(f"{metadata.path}: RoPE scaling with {key} = {value} is not supported.")
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": metadata.positive(metadata.own("rope.scaling.original_context_length")),
    }
    for key in ("beta_fast", "beta_slow"):
        value = metadata.optional(metadata.own(f"rope.scaling.yarn_{key}"), float)
        if value is not None:
            scaling[key] = value
    return scaling


def llama3_scaling(metadata: Metadata, divisors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Llama 3's parameters behind `divisors` (float32 (head_dim / 2,)); None where all are one.

    Raises:
        UnsupportedError: the divisors follow another rule.
    """
    factor = float(divisors.max())
    if np.array_equal(divisors, np.ones_like(divisors)):
        return None
    declared = metadata.optional(metadata.own("rope.scaling.original_context_length"), int)
    for context in (declared, _LLAMA3_CONTEXT):
        if context and np.allclose(_llama3_divisors(len(divisors), theta, factor, context), divisors, rtol=1e-3):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedError(f"{metadata.path}: its rope_freqs.weight does not follow Llama 3's RoPE scaling.")


def _llama3_divisors(count: int, theta: float, factor: float, context: int) -> np.ndarray:
    wavelengths = 2 * math.pi * theta ** (np.arange(count) / count)
    smooth = (context / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    blended: np.ndarray = 1 / ((1 - smooth) / factor + smooth)
    return np.where(smooth < 0, factor, np.where(smooth > 1, 1.0, blended))
