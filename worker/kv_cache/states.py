"""Recurrent states: what gated-delta layers keep per sequence, the pool that holds it, and which slots a step uses.

    StateCache (from the model) --state_spec_of--> vLLM MambaSpec --vLLM--> block ids --> slots of StatePool
    Batch --plan_rows--> RowPlan (once per step) --plan_slots--> SlotPlan (per group) --> every gated-delta layer

A slot is a block id of vLLM's: it holds the state of one sequence after its last computed token (vLLM's MambaSpec,
v1/kv_cache_interface.py). A group's block table has one entry per `block_size` tokens, and the state after n tokens is
in entry (n - 1) // block_size. In vLLM's mode "none" a sequence has one entry for its whole life; in mode "align",
which caches prefixes, it moves on to a new slot at each block boundary and leaves the state at the boundary behind for
other sequences to start from. The same formula serves both, and the worker keeps no account of slots.

A sequence at position 0 starts from zeros, whatever its slot holds: it is new, or it was preempted and starts over.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from math import prod

import mlx.core as mx
import numpy as np

from pomarium.worker.batch import Batch

MAX_PADDING = 1.5
"""Padded rows of a bundle, relative to its own. Projections run over the padded rows, so they bound its cost."""
CHEAP_ROWS = 16
"""Rows of padding that are worth less than a bundle of their own."""


@dataclass(frozen=True)
class StateCache:
    """What one gated-delta layer keeps per sequence.

    Attributes:
        conv: (kernel_size - 1, channels), the last inputs of its convolution, in `conv_dtype`.
        recurrent: (value_heads, value_dim, key_dim), float32.
    """

    conv: tuple[int, int]
    recurrent: tuple[int, int, int]
    conv_dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one slot."""
        return prod(self.conv) * self.conv_dtype.size + prod(self.recurrent) * mx.float32.size


@dataclass(frozen=True)
class StateGroup:
    """Layers that share block tables, and so the slots of a step.

    Attributes:
        layers: indices into `StateLayout.layers`. block_size: tokens per table entry.
        table: which of a request's block tables is theirs.
    """

    layers: tuple[int, ...]
    block_size: int
    table: int


@dataclass(frozen=True)
class StateLayout:
    """Where the states of each layer live.

    Attributes:
        layers: all alike. groups: cover each layer once.
        buffer_of_layer: layer -> buffer; layers of different groups may share one, as a slot is in one group at a time.
        num_slots: per buffer; slot 0 is never written.

    Raises:
        ValueError: layers of one buffer differ.
    """

    layers: tuple[StateCache, ...]
    groups: tuple[StateGroup, ...]
    buffer_of_layer: tuple[int, ...]
    num_slots: int

    def __post_init__(self) -> None:
        kept: dict[int, StateCache] = {}
        for layer, cache in enumerate(self.layers):
            if kept.setdefault(self.buffer_of_layer[layer], cache) != cache:
                raise ValueError(f"layers of one state buffer differ: {kept[self.buffer_of_layer[layer]]} and {cache}")

    @property
    def group_index(self) -> dict[int, int]:
        """Layer -> index of its group."""
        return {layer: index for index, group in enumerate(self.groups) for layer in group.layers}


def single_group_states(layers: SequenceOf[StateCache], block_size: int, num_slots: int, table: int = 0) -> StateLayout:
    """A layout with one buffer per layer and one group: what the engine below vLLM uses on its own."""
    every = tuple(range(len(layers)))
    groups = (StateGroup(every, block_size, table),) if layers else ()
    return StateLayout(tuple(layers), groups, every, num_slots)


class StatePool:
    """Owner of the state buffers, which MLX operations write in place (see kv_cache.pool for what that takes)."""

    def __init__(self, layout: StateLayout) -> None:
        """Allocate zeroed buffers."""
        self.layout = layout
        self._conv: dict[int, mx.array] = {}
        self._recurrent: dict[int, mx.array] = {}
        for layer, cache in enumerate(layout.layers):
            buffer = layout.buffer_of_layer[layer]
            if buffer not in self._conv:
                self._conv[buffer] = mx.zeros((layout.num_slots, *cache.conv), cache.conv_dtype)
                self._recurrent[buffer] = mx.zeros((layout.num_slots, *cache.recurrent), mx.float32)
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All buffers, to evaluate a step's writes."""
        return [*self._conv.values(), *self._recurrent.values()]

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(array.nbytes for array in self.arrays)

    def read(self, layer: int, slots: mx.array) -> tuple[mx.array, mx.array]:
        """Copies of the states in `slots` int32 (S,): conv (S, kernel_size - 1, channels) and recurrent (S, heads,
        value_dim, key_dim)."""
        buffer = self.layout.buffer_of_layer[layer]
        return mx.take(self._conv[buffer], slots, axis=0), mx.take(self._recurrent[buffer], slots, axis=0)

    def write(self, layer: int, slots: mx.array, conv: mx.array, recurrent: mx.array) -> None:
        """Store states, as `read` returns them, in `slots` int32 (S,), all different."""
        buffer = self.layout.buffer_of_layer[layer]
        self._conv[buffer][slots] = conv
        self._recurrent[buffer][slots] = recurrent


@dataclass(frozen=True)
class RowBundle:
    """S sequences of a step, padded to L rows each.

    Attributes:
        sequences: which ones, numbers into Batch.sequences.
        rows: int32 (S x L,), the step's row for each padded place; None if they are all rows, in order.
        lengths: int32 (S,), rows of each; None if all have L.
        length: L.
        fresh: bool (S,), those that start at position 0; None if there are none.
        all_fresh: there are no others.
    """

    sequences: tuple[int, ...]
    rows: mx.array | None
    lengths: mx.array | None
    length: int
    fresh: mx.array | None
    all_fresh: bool


@dataclass(frozen=True)
class RowPlan:
    """How a step's T rows are regrouped into sequences.

    Attributes:
        order: int32 (T,), where each row's output stands in the bundles' outputs, one after another; None if in order.
    """

    bundles: tuple[RowBundle, ...]
    order: mx.array | None


@dataclass(frozen=True)
class SlotPlan:
    """Slots of one bundle's S sequences in one group: int32 (S,) each, where states are read and written."""

    read: mx.array
    write: mx.array


def bundle_lengths(lengths: SequenceOf[int]) -> list[list[int]]:
    """Partition sequences, by number, into bundles of like length, within the bounds above; each bundle ascends."""
    bundles: list[list[int]] = []
    rows = 0
    for number in sorted(range(len(lengths)), key=lambda number: (lengths[number], number)):
        length = lengths[number]
        if bundles:
            grown, padded = rows + length, (len(bundles[-1]) + 1) * length
            if padded <= MAX_PADDING * grown or padded - grown <= CHEAP_ROWS:
                bundles[-1].append(number)
                rows = grown
                continue
        bundles.append([number])
        rows = length
    return [sorted(bundle) for bundle in bundles]


def plan_rows(batch: Batch) -> RowPlan:
    """Regroup the rows of a step."""
    lengths = [sequence.length for sequence in batch.sequences]
    starts = np.array([sequence.start for sequence in batch.sequences], np.int32)
    first = np.cumsum([0, *lengths], dtype=np.int32)
    total = int(first[-1])
    order, place, bundles = np.empty(total, np.int32), 0, []
    for numbers in bundle_lengths(lengths):
        own = np.array([lengths[number] for number in numbers], np.int32)
        longest = int(own.max())
        # Padding repeats a sequence's last row, which is masked: it only has to be some row.
        rows = first[numbers][:, None] + np.minimum(np.arange(longest, dtype=np.int32), own[:, None] - 1)
        for number in numbers:
            order[first[number] : first[number + 1]] = np.arange(place, place + lengths[number])
            place += longest
        flat = rows.reshape(-1).astype(np.int32)
        fresh = starts[numbers] == 0
        bundles.append(
            RowBundle(
                tuple(numbers),
                None if _is_range(flat, total) else mx.array(flat),
                None if (own == longest).all() else mx.array(own),
                longest,
                mx.array(fresh) if fresh.any() else None,
                bool(fresh.all()),
            )
        )
    return RowPlan(tuple(bundles), None if _is_range(order, place) else mx.array(order))


def plan_slots(batch: Batch, group: StateGroup, rows: RowPlan) -> tuple[SlotPlan, ...]:
    """The slots of `group` for each bundle of `rows`."""
    slots = sequence_slots(batch, group)
    return tuple(SlotPlan(*(mx.array(column) for column in slots[list(bundle.sequences)].T)) for bundle in rows.bundles)


def sequence_slots(batch: Batch, group: StateGroup) -> np.ndarray:
    """int32 (S, 2): the slot that each sequence of a step goes on from, and the one that its new state goes to.

    The former is 0 for a sequence at position 0.
    """
    slots = np.zeros((len(batch.sequences), 2), np.int32)
    for row, sequence in zip(slots, batch.sequences, strict=True):
        table = sequence.block_tables[group.table]
        if sequence.start > 0:
            row[0] = table[(sequence.start - 1) // group.block_size]
        row[1] = table[(sequence.start + sequence.length - 1) // group.block_size]
    return slots


def _is_range(indices: np.ndarray, count: int) -> bool:
    return indices.size == count and bool((indices == np.arange(count)).all())
