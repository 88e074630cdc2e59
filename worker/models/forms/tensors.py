"""Tensors as transformers 5 saves them, under the names and in the shapes that mlx-lm's `sanitize` takes.

Only families whose definition knows one way of storing and whose checkpoints come in two. All arrays stay lazy.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import mlx.core as mx

Weights = Mapping[str, mx.array]
_ERNIE_BIAS, SELECTION_BIAS = "mlp.moe_statics.e_score_correction_bias", "mlp.selection_bias"


def _gpt_oss(weights: Weights) -> dict[str, mx.array]:
    """Dense experts, (experts, in, out), gate and up interleaved; releases are MXFP4, which mlx-lm splits itself."""
    if not any(name.endswith("experts.gate_up_proj") for name in weights):
        return dict(weights)
    split: dict[str, mx.array] = {}
    for name, array in weights.items():
        stem, _, last = name.rpartition(".")
        if last in ("gate_up_proj", "gate_up_proj_bias"):
            kind = "bias" if last.endswith("bias") else "weight"
            for part, offset in (("gate_proj", 0), ("up_proj", 1)):
                half = array[..., offset::2]
                split[f"{stem}.{part}.{kind}"] = half if kind == "bias" else half.swapaxes(-1, -2)
        elif last == "down_proj":
            split[f"{stem}.down_proj.weight"] = array.swapaxes(-1, -2)
        elif last == "down_proj_bias":
            split[f"{stem}.down_proj.bias"] = array
        else:
            split[name] = array
    return split


def _gpt2(weights: Weights) -> dict[str, mx.array]:
    """The releases' names, which lack what transformers puts before them."""
    return {name.removeprefix("transformer."): array for name, array in weights.items()}


def _ernie4_5_moe(weights: Weights) -> dict[str, mx.array]:
    """The bias by which experts are selected under a name that mlx-lm's `sanitize` does not drop; see mends.py."""
    found = {
        name.replace(_ERNIE_BIAS, SELECTION_BIAS): array.flatten() if name.endswith(_ERNIE_BIAS) else array
        for name, array in weights.items()
    }
    gates = [name for name in found if name.endswith("mlp.gate.weight")]
    missing = {name.replace("mlp.gate.weight", SELECTION_BIAS): found[name].shape[0] for name in gates}
    return {name: mx.zeros((experts,)) for name, experts in missing.items()} | found


CONVERSIONS: Mapping[str, Callable[[Weights], dict[str, mx.array]]] = MappingProxyType(
    {
        "ernie4_5_moe": _ernie4_5_moe,
        "gpt2": _gpt2,
        "gpt_oss": _gpt_oss,
    }
)
"""Model type -> what comes before mlx-lm's `sanitize`."""
