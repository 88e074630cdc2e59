"""Experts selected and weighed as transformers does, for definitions of mlx-lm that do it otherwise.

Jamba     weights are those of a softmax over all experts; mlx-lm takes it over the selected ones
ERNIE 4.5 a bias, which balances their load, is added for the selection alone; mlx-lm drops it
"""

from collections.abc import Mapping
from types import MappingProxyType

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import ernie4_5_moe, jamba


class JambaExperts(jamba.JambaSparseMoeBlock):
    """Source: transformers/models/jamba/modeling_jamba.py, JambaSparseMoeBlock."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        weights = mx.softmax(self.router(x), axis=-1, precise=True)
        chosen = _largest(weights, self.num_experts_per_tok)
        return _mixture(self.switch_mlp(x, chosen), mx.take_along_axis(weights, chosen, axis=-1))


class Ernie4_5Experts(ernie4_5_moe.Ernie4_5_MoeMLP):  # noqa: N801
    """Source: transformers/models/ernie4_5_moe/modeling_ernie4_5_moe.py, Ernie4_5_MoeTopKRouter."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        gates = self.gate_act(self.gate(x).astype(mx.float32))
        chosen = _largest(gates + self.selection_bias, self.k)
        weights = mx.take_along_axis(gates, chosen, axis=-1)
        weights = weights / mx.maximum(weights.sum(axis=-1, keepdims=True), 1e-12)
        mixed = _mixture(self.switch_mlp(x, chosen), weights)
        return mixed if self.shared_experts is None else mixed + self.shared_experts(x)


def _largest(scores: mx.array, count: int) -> mx.array:
    return mx.stop_gradient(mx.argpartition(-scores, kth=count - 1, axis=-1)[..., :count])


def _mixture(outputs: mx.array, weights: mx.array) -> mx.array:
    return (outputs * weights[..., None]).sum(axis=-2).astype(outputs.dtype)


REROUTED: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        jamba.JambaSparseMoeBlock: JambaExperts,
        ernie4_5_moe.Ernie4_5_MoeMLP: Ernie4_5Experts,
    }
)


def add_selection_bias(model: nn.Module) -> None:
    """Give ERNIE's blocks the parameter that mlx-lm's lack: float32 (experts,)."""
    for module in model.modules():
        if isinstance(module, Ernie4_5Experts):
            module.selection_bias = mx.zeros((module.args.moe_num_experts,))
