"""Gated-delta layers through kernels: rows stay as they are, and states are written in place.

    Batch --KernelStateBackend.prepare--> GatedDeltaPlan per group --KernelStates.run, per layer-->
    mlx-lm's projections --> conv1d_silu --> recurrent --> mlx-lm's norm and output projection

Only the call is ours: projections, norms and weights stay mlx-lm's objects. `state_backend` chooses between this and
EagerStateBackend, once, and says why if it is not this.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import qwen3_5, qwen3_next

from pomarium.kernels.cache_writes import unset
from pomarium.kernels.gated_delta import (
    FRESH,
    GatedDeltaPlan,
    GatedDeltaShape,
    conv1d_silu,
    plan,
    plan_decode,
    recurrent,
)
from pomarium.kernels.launch import Launcher
from pomarium.kernels.ordered import Ordered
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.hybrid import EagerStateBackend, HybridBackend, ModuleCall, StateBackend
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.states import StateGroup, StateLayout, StatePool, sequence_slots

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Projections:
    """What a gated-delta module makes of T rows before its convolution.

    Attributes:
        qkv: (T, channels). z: (T, 1, value_heads, value_dim), the output's gate. a, b: (T, value_heads).
    """

    qkv: mx.array
    z: mx.array
    a: mx.array
    b: mx.array


def project(module: nn.Module, inputs: mx.array) -> Projections:
    """The projections of rows (T, 1, hidden), as the modules' own calls make them.

    Raises:
        TypeError: `module` is not one of mlx-lm's gated-delta modules.
    """
    rows = inputs.shape[0]
    if isinstance(module, qwen3_5.GatedDeltaNet):
        z = module.in_proj_z(inputs).reshape(rows, 1, module.num_v_heads, module.head_v_dim)
        a, b = module.in_proj_a(inputs), module.in_proj_b(inputs)
        return Projections(module.in_proj_qkv(inputs)[:, 0], z, a[:, 0], b[:, 0])
    if isinstance(module, qwen3_next.Qwen3NextGatedDeltaNet):
        q, k, v, z, b, a = module.fix_query_key_value_ordering(module.in_proj_qkvz(inputs), module.in_proj_ba(inputs))
        qkv = mx.concatenate([part.reshape(rows, -1) for part in (q, k, v)], axis=-1)
        # Views of one product where there is a single key head; kernels take row-major arrays.
        return Projections(qkv, z, mx.contiguous(a[:, 0]), mx.contiguous(b[:, 0]))
    raise TypeError(f"{type(module).__name__} is not a gated-delta module")


class KernelStates:
    """StateStep (attention.hybrid) through kernels."""

    def __init__(
        self,
        backend: "KernelStateBackend",
        plans: Sequence[GatedDeltaPlan],
        pools: Mapping[int, tuple[Ordered, Ordered]],
    ) -> None:
        """Args:
        plans: for each group of the backend's layout. pools: the backend's, or branches of them.
        """
        self._backend = backend
        self._plans = plans
        self._pools = pools

    def run(self, layer: int, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """See StateStep.run."""
        backend = self._backend
        rows = inputs.shape[0]
        step = self._plans[backend.group_index[layer]]
        conv, states = self._pools[backend.layout.buffer_of_layer[layer]]
        made = project(module, inputs)
        weight = module.conv1d.weight.reshape(backend.shape.channels, backend.shape.kernel_size)
        qkv = conv1d_silu(backend.launcher, conv, backend.shape, step, made.qkv, weight)
        y = recurrent(backend.launcher, states, backend.shape, step, qkv, made.a, made.b, module.A_log, module.dt_bias)
        out: mx.array = module.out_proj(module.norm(y[:, None], made.z).reshape(rows, 1, -1))
        return out


class KernelStateBackend:
    """StateBackend (attention.hybrid) over pools that kernels write in place.

    Attributes:
        pools: by buffer, of convolution and recurrent states.
    """

    def __init__(self, layout: StateLayout, shape: GatedDeltaShape, launcher: Launcher) -> None:
        """Allocate pools, which nobody zeroes: a sequence at position 0 reads no slot, and others what they wrote."""
        self.layout, self.shape, self.launcher = layout, shape, launcher
        self.group_index = layout.group_index
        self.pools: dict[int, tuple[Ordered, Ordered]] = {}
        for layer, cache in enumerate(layout.layers):
            buffer = layout.buffer_of_layer[layer]
            if buffer not in self.pools:
                conv, _ = unset(launcher, (layout.num_slots, *cache.conv), cache.conv_dtype)
                states, _ = unset(launcher, (layout.num_slots, *cache.recurrent), mx.float32)
                mx.eval(conv, states)
                self.pools[buffer] = (Ordered(conv), Ordered(states))

    @property
    def arrays(self) -> list[mx.array]:
        """See StateBackend.arrays."""
        return [array for pool in self.ordered for array in pool.arrays]

    def prepare(self, batch: Batch) -> KernelStates:
        """See StateBackend.prepare."""
        lengths = np.array([sequence.length for sequence in batch.sequences])
        plans = [plan(lengths, _slots(batch, group), self.layout.num_slots) for group in self.layout.groups]
        return KernelStates(self, plans, self.pools)

    @property
    def in_graphs(self) -> "KernelStateBackend":
        """See StateBackend.in_graphs."""
        return self

    @property
    def ordered(self) -> list[Ordered]:
        """See GraphStates.ordered."""
        return [pool for pools in self.pools.values() for pool in pools]

    def slots(self, batch: Batch, rows: int) -> list[mx.array]:
        """See GraphStates.slots."""
        num_slots = self.layout.num_slots
        return [plan_decode(_slots(batch, group), num_slots, rows).sequences for group in self.layout.groups]

    def step(self, rows: int, slots: Sequence[mx.array], ordered: Sequence[Ordered]) -> KernelStates:
        """See GraphStates.step."""
        plans = [GatedDeltaPlan(self.layout.num_slots, rows, rows, sequences) for sequences in slots]
        pairs = zip(ordered[::2], ordered[1::2], strict=True)
        return KernelStates(self, plans, dict(zip(self.pools, pairs, strict=True)))


def _slots(batch: Batch, group: StateGroup) -> np.ndarray:
    """int32 (S, 2), as `gated_delta.plan` takes them."""
    slots = sequence_slots(batch, group)
    slots[[sequence.start == 0 for sequence in batch.sequences], 0] = FRESH
    return slots


def shape_of(layout: StateLayout) -> GatedDeltaShape:
    """What the kernels have to know of a layout's layers, all alike.

    Raises:
        ValueError: the states are not those of gated-delta layers.
    """
    cache = layout.layers[0]
    kept, channels = cache.conv
    value_heads, value_dim, key_dim = cache.recurrent
    key_heads, rest = divmod(channels - value_heads * value_dim, 2 * key_dim)
    if rest or key_heads < 1:
        raise ValueError(f"a convolution of {channels} channels does not fit states {cache.recurrent}")
    return GatedDeltaShape(key_heads, value_heads, key_dim, value_dim, kept + 1, layout.num_slots, cache.conv_dtype)


def state_backend(layout: StateLayout, launcher: Launcher | None) -> StateBackend:
    """The kernels' backend, or where they are not wanted (`launcher` None) or do not fit, mlx-lm's modules'."""
    if launcher is None:
        return EagerStateBackend(StatePool(layout))
    shape = shape_of(layout)
    if (reason := shape.unsupported) is not None:
        logger.info("Gated-delta layers run as MLX operations: no kernel takes %s.", reason)
        return EagerStateBackend(StatePool(layout))
    return KernelStateBackend(layout, shape, launcher)


def with_states(attention: AttentionBackend, layout: StateLayout, launcher: Launcher | None) -> HybridBackend:
    """`attention` and, beside it, the states of `layout`; `launcher` as for `state_backend`."""
    states = state_backend(layout, launcher)
    logger.info("State pool: %d slots, %d MiB", layout.num_slots, sum(a.nbytes for a in states.arrays) >> 20)
    return HybridBackend(attention, states)
