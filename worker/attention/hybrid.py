"""Hybrid models: layers that attend over the paged pool, and gated-delta layers that go on from a pool of states.

    Batch --HybridBackend.prepare--> HybridStep --attend--> StepAttention (attention layers)
                                                --run-----> StateStep (gated-delta layers)

A gated-delta layer is a recurrence over a sequence, so rows of length one do not do: `EagerStates` regroups the step's
rows into padded sequences, hands them to mlx-lm's own module with the states they go on from, and puts outputs and new
states back where they belong. What is gathered and where it goes was planned once per step (kv_cache.states).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from pomarium.kernels.ordered import Ordered
from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import AttentionBackend, InGraphs, StepAttention
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.states import RowBundle, RowPlan, SlotPlan, StatePool, plan_rows, plan_slots


class SequenceStates:
    """What mlx-lm's module gets as its cache: the states of S sequences (mlx_lm/models/cache.py, ArraysCache).

    Attributes:
        lengths: int32 (S,), tokens of each sequence, or None if all have as many as the input.
    """

    def __init__(self, conv: mx.array | None, recurrent: mx.array | None, lengths: mx.array | None) -> None:
        self.lengths = lengths
        self._arrays = [conv, recurrent]

    def __getitem__(self, index: int) -> mx.array | None:
        return self._arrays[index]

    def __setitem__(self, index: int, array: mx.array) -> None:
        self._arrays[index] = array

    def advance(self, count: int) -> None:
        """mlx-lm's place to count tokens; the scheduler does."""

    def updated(self) -> tuple[mx.array, mx.array]:
        """The states after the module ran: conv (S, kernel_size - 1, channels), recurrent (S, heads, value_dim,
        key_dim)."""
        conv, recurrent = self._arrays
        assert conv is not None
        assert recurrent is not None
        return conv, recurrent


ModuleCall = Callable[[mx.array, mx.array | None, SequenceStates], mx.array]
"""mlx-lm's module: inputs (S, L, hidden), mask bool (S, L) or None, states -> (S, L, hidden)."""


class StateStep(Protocol):
    """The gated-delta layers of one step."""

    def run(self, layer: int, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """Go on from each sequence's state, and store the new one.

        Args:
            layer: index of the state layer. module: mlx-lm's, whose own call is `call`.
            inputs: (T, 1, hidden), the step's rows.

        Returns:
            (T, 1, hidden).
        """
        ...


class EagerStates:
    """StateStep through mlx-lm's own call."""

    def __init__(self, pool: StatePool, rows: RowPlan, slots: Sequence[tuple[SlotPlan, ...]]) -> None:
        """`slots`: for each group of the pool's layout, of each bundle of `rows`."""
        self._pool = pool
        self._rows = rows
        self._slots = slots
        self._group_index = pool.layout.group_index

    def run(self, layer: int, module: nn.Module, call: ModuleCall, inputs: mx.array) -> mx.array:
        """See StateStep.run."""
        outputs = []
        for bundle, slots in zip(self._rows.bundles, self._slots[self._group_index[layer]], strict=True):
            states = self._gather(layer, bundle, slots)
            output = call(_sequences(inputs, bundle), _mask(bundle), states)
            self._pool.write(layer, slots.write, *states.updated())
            outputs.append(output.reshape(-1, 1, output.shape[-1]))
        rows = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
        return rows if self._rows.order is None else rows[self._rows.order]

    def _gather(self, layer: int, bundle: RowBundle, slots: SlotPlan) -> SequenceStates:
        if bundle.all_fresh:
            return SequenceStates(None, None, bundle.lengths)
        conv, recurrent = self._pool.read(layer, slots.read)
        if bundle.fresh is not None:
            conv = mx.where(bundle.fresh[:, None, None], mx.zeros((), conv.dtype), conv)
            recurrent = mx.where(bundle.fresh[:, None, None, None], mx.zeros((), recurrent.dtype), recurrent)
        return SequenceStates(conv, recurrent, bundle.lengths)


def _sequences(inputs: mx.array, bundle: RowBundle) -> mx.array:
    rows = inputs if bundle.rows is None else inputs[bundle.rows]
    return rows.reshape(len(bundle.sequences), bundle.length, inputs.shape[-1])


def _mask(bundle: RowBundle) -> mx.array | None:
    return None if bundle.lengths is None else mx.arange(bundle.length) < bundle.lengths[:, None]


@dataclass(frozen=True)
class HybridStep:
    """One step of a hybrid model: a StepAttention, and the StateStep beside it."""

    attention: StepAttention
    states: StateStep

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend`."""
        return self.attention.attend(layer, queries, keys, values, scoring)

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        """See `base.StepAttention.attend_shared`."""
        return self.attention.attend_shared(layer, queries, keys, values, scoring)

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """See `base.StepAttention.attend_latents`."""
        return self.attention.attend_latents(layer, queries, latents, rank, scoring)


class GraphStates(Protocol):
    """States that steps of one row per sequence go on from in a graph that serves many (decode_graphs)."""

    @property
    def ordered(self) -> Sequence[Ordered]:
        """All that such a step writes in place."""
        ...

    def slots(self, batch: Batch, rows: int) -> list[mx.array]:
        """Index arrays of a batch, padded to `rows`: what changes from step to step."""
        ...

    def step(self, rows: int, slots: Sequence[mx.array], ordered: Sequence[Ordered]) -> StateStep:
        """From index arrays, and branches of `ordered` in its order."""
        ...


class StateBackend(Protocol):
    """Maker of StateStep; owns the pool of states."""

    @property
    def in_graphs(self) -> GraphStates | None:
        """None where a graph does not serve another step."""
        ...

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays that a step writes in place; evaluate them with its results."""
        ...

    def prepare(self, batch: Batch) -> StateStep:
        """Index arrays of a step."""
        ...


class EagerStateBackend:
    """StateBackend over a StatePool."""

    in_graphs = None

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool

    @property
    def arrays(self) -> list[mx.array]:
        """See StateBackend.arrays."""
        return self._pool.arrays

    def prepare(self, batch: Batch) -> EagerStates:
        """See StateBackend.prepare."""
        rows = plan_rows(batch)
        return EagerStates(self._pool, rows, [plan_slots(batch, group, rows) for group in self._pool.layout.groups])


class HybridBackend:
    """An AttentionBackend (see `base`) that also keeps states."""

    def __init__(self, attention: AttentionBackend, states: StateBackend) -> None:
        self.attention = attention
        self.states = states

    @property
    def in_graphs(self) -> "HybridGraphs | None":
        """See `base.AttentionBackend.in_graphs`."""
        attention, states = self.attention.in_graphs, self.states.in_graphs
        return None if attention is None or states is None else HybridGraphs(attention, states)

    @property
    def arrays(self) -> list[mx.array]:
        """See `base.AttentionBackend.arrays`."""
        return [*self.attention.arrays, *self.states.arrays]

    def prepare(self, batch: Batch) -> HybridStep:
        """See `base.AttentionBackend.prepare`."""
        return HybridStep(self.attention.prepare(batch), self.states.prepare(batch))


class HybridGraphs:
    """Attention and states of decode steps as part of a graph (see `base.InGraphs`); the slots come last."""

    def __init__(self, attention: InGraphs, states: GraphStates) -> None:
        self._attention = attention
        self._states = states

    @property
    def ordered(self) -> list[Ordered]:
        """See InGraphs.ordered."""
        return [*self._attention.ordered, *self._states.ordered]

    def bucket(self, batch: Batch, rows: int) -> tuple[Any, list[list[mx.array]]] | None:
        """See InGraphs.bucket."""
        found = self._attention.bucket(batch, rows)
        return None if found is None else (found[0], [*found[1], self._states.slots(batch, rows)])

    def step(
        self, rows: int, agreed: Any, arrays: Sequence[Sequence[mx.array]], ordered: Sequence[Ordered]
    ) -> HybridStep:
        """See InGraphs.step."""
        of_attention = len(self._attention.ordered)
        attention = self._attention.step(rows, agreed, arrays[:-1], ordered[:of_attention])
        return HybridStep(attention, self._states.step(rows, arrays[-1], ordered[of_attention:]))
