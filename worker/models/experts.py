"""Experts stored one by one, stacked as mlx-lm's definition of Qwen3.5 MoE takes them.

    mlp.experts.<i>.{gate,up,down}_proj.weight --stacked--> mlp.switch_mlp.{gate,up,down}_proj.weight, lazy

Dense releases store all experts of a layer in one tensor, which mlx_lm/models/qwen3_5_moe.py splits in its `sanitize`;
FP8 releases store them one by one, each with its scales, which it does not know.
"""

import re
from collections.abc import Mapping

import mlx.core as mx

MODEL_TYPES = frozenset({"qwen3_5_moe"})
"""Model types whose definition does not stack experts by itself."""

_EXPERT = re.compile(r"(.+\.mlp)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def stacked(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """`weights` with the experts (m, n) of each layer as one array (experts, m, n), in the order of their numbers."""
    kept: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in weights.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            kept[name] = array
        else:
            experts.setdefault(f"{match[1]}.switch_mlp.{match[3]}.weight", {})[int(match[2])] = array
    return kept | {name: mx.stack([held[index] for index in sorted(held)]) for name, held in experts.items()}
