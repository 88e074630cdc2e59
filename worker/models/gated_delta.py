"""Gated-delta layers of unmodified mlx-lm models over rows: Qwen3-Next and Qwen3.5/3.6.

    model(token_ids[:, None], cache) --> GatedDeltaNet(inputs (T, 1, hidden), cache: StateRows) --> StateStep.run

As with attention (models.rows), the model sees T sequences of one token, and the kind of cache decides where a layer's
work is done: with StateRows in the step's StateStep, with any other cache in mlx-lm's own call, untouched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import qwen3_5, qwen3_next
from mlx_lm.models.cache import ArraysCache

from pomarium.worker.attention.base import StepAttention
from pomarium.worker.attention.hybrid import HybridStep, ModuleCall, SequenceStates, StateStep
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.models.stages import LayerTrace


class StateRows:
    """What a gated-delta layer gets as its cache: the way to the pool of states."""

    def __init__(self, layer: int, step: StateStep) -> None:
        self._layer = layer
        self._step = step

    def make_mask(self, length: int) -> None:
        """No mask: rows are whole."""

    def run(self, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """(T, 1, hidden) in and out."""
        return self._step.run(self._layer, module, call, inputs)


def _regrouped(base: type[nn.Module]) -> type[nn.Module]:
    forward = base.__call__

    def call(module: nn.Module, inputs: mx.array, mask: mx.array | None = None, cache: object = None) -> mx.array:
        """inputs: (T, 1, hidden); the same shape out."""
        if isinstance(cache, StateRows):
            return cache.run(module, lambda rows, valid, states: forward(module, rows, valid, states), inputs)
        original: mx.array = forward(module, inputs, mask, cache)
        return original

    return type(base.__name__, (base,), {"__module__": base.__module__, "__call__": call})


_REGROUPED: dict[type[nn.Module], type[nn.Module]] = {
    kind: _regrouped(kind) for kind in (qwen3_next.Qwen3NextGatedDeltaNet, qwen3_5.GatedDeltaNet)
}


def reroute_gated_delta(model: nn.Module) -> None:
    """Let the gated-delta modules of `model` go by the kind of cache. Idempotent."""
    for module in model.modules():
        if type(module) in _REGROUPED:
            module.__class__ = _REGROUPED[type(module)]


def gated_delta_entries(model: nn.Module, caches: Sequence[object]) -> list[int]:
    """Which of the model's `caches`, as mlx-lm makes them, are of gated-delta layers; none in a model without such."""
    if not any(isinstance(module, tuple(_REGROUPED)) for module in model.modules()):
        return []
    return [entry for entry, cache in enumerate(caches) if isinstance(cache, ArraysCache)]


def states_of(step: StepAttention) -> StateStep:
    """The StateStep of a hybrid model's step. Raises TypeError if `step` is of a backend without states."""
    if not isinstance(step, HybridStep):
        raise TypeError(f"a hybrid model's step keeps states, {type(step).__name__} does not")
    return step.states


@dataclass
class StateDryRun:
    """A StateStep that records what each layer keeps, and within which layer of `trace` if there is one."""

    trace: LayerTrace | None = None
    seen: dict[int, StateCache] = field(default_factory=dict)
    layer_of: dict[int, int] = field(default_factory=dict)

    def run(self, layer: int, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """See StateStep.run; each row is a sequence at position 0."""
        if layer in self.seen:
            raise UnsupportedError(f"layer {layer} runs twice in a step")
        states = SequenceStates(None, None, None)
        output = call(inputs, None, states)
        conv, recurrent = states.updated()
        _, kept, channels = conv.shape
        _, heads, value_dim, key_dim = recurrent.shape
        self.seen[layer] = StateCache((kept, channels), (heads, value_dim, key_dim), conv.dtype)
        if self.trace is not None:
            if self.trace.current is None:
                raise UnsupportedError(f"cache entry {layer} is used outside of the layers")
            self.layer_of[layer] = self.trace.current
        return output


@dataclass(frozen=True)
class ForeignStates:
    """StateStep of layers that another stage computes."""

    def run(self, layer: int, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError(f"cache entry {layer} belongs to another stage")
