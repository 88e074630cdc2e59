"""Decode steps as graphs that are built once: the model's layers run without Python.

    Batch of one row per sequence --bucket_of--> Bucket (shapes), BucketArrays (all that changes from step to step)
        --DecodeGraphs.run--> the bucket's graph, traced when it is first met --> outputs of the batch's rows, lazily

Python builds a layer's graph in about as long as a GPU computes it for one sequence. `mx.compile` keeps what was built;
it serves another step if that differs in nothing but the arrays which the graph takes. So a step is padded to a bucket:
rows that store nowhere and see no key, whose outputs nobody reads, and partitions without keys (paged_plan.room). The
pools are no inputs. Kernels write them in place, in the order of the tokens that go in and come out (kernels.ordered).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx
import numpy as np

from pomarium.kernels.ordered import Ordered
from pomarium.kernels.paged_attention import DecodePlan, plan_decode
from pomarium.kernels.paged_plan import room
from pomarium.kernels.paged_tuning import DecodeVariant
from pomarium.worker.attention.base import AttentionBackend, StepAttention
from pomarium.worker.attention.gathered import GatheredStep
from pomarium.worker.attention.hybrid import GraphStates, HybridStep
from pomarium.worker.attention.kernels import (
    AttentionPlan,
    KernelAttention,
    Kernels,
    KernelStep,
    PlanKey,
    group_rows,
)
from pomarium.worker.batch import Batch

logger = logging.getLogger(__name__)

MOST_GRAPHS = 48
"""Graphs that are kept. A batch that grows to 64 sequences of 32,000 tokens each comes through about so many."""


class RowsModel(Protocol):
    """From rows to what the next stage or the sampler takes: models.paged's PagedModel or StageModel."""

    def __call__(
        self,
        inputs: np.ndarray | mx.array,
        positions: np.ndarray | mx.array,
        step: StepAttention,
        rows: np.ndarray | mx.array,
    ) -> mx.array:
        """See PagedModel and StageModel."""
        ...


@dataclass(frozen=True)
class PlanRoom:
    """Shapes of one plan. partitions, width: of its work list and its tables."""

    key: PlanKey
    variant: DecodeVariant
    partitions: int
    width: int


@dataclass(frozen=True)
class Bucket:
    """What steps that share a graph agree in. rows: sequences and those that they are padded to."""

    rows: int
    plans: tuple[PlanRoom, ...]


@dataclass(frozen=True)
class BucketArrays:
    """All that changes from step to step beside the model's inputs.

    Attributes:
        positions: int32 (rows,). plans: tables, work, reduce and ints of each plan. slots: see GraphStates.slots.
    """

    positions: mx.array
    plans: list[list[mx.array]]
    slots: list[mx.array]


def bucket_of(kernels: Kernels, states: GraphStates | None, batch: Batch) -> tuple[Bucket, BucketArrays]:
    """Of a batch of one row per sequence, for the plans that layers have asked for.

    Raises:
        ValueError: as `plan_decode`, of attention or of states, does.
    """
    pool, rows = kernels.pool, room(len(batch.sequences))
    groups = pool.layout.groups
    found = [group_rows(batch, group) for group in groups]
    positions = np.zeros(rows, np.int32)
    positions[: len(batch.positions)] = batch.positions
    rooms, arrays = [], []
    for key in kernels.asked:
        group_index, shape, _ = key
        group = groups[group_index]
        spans, tables = found[group_index].spans, found[group_index].tables
        plan = plan_decode(spans, tables, shape, group.window, kernels.gpu, padded=True)
        rooms.append(PlanRoom(key, plan.variant, plan.items, plan.tables.size // rows))
        arrays.append([plan.tables, plan.work, plan.reduce, plan.ints])
    slots = [] if states is None else states.slots(batch, rows)
    return Bucket(rows, tuple(rooms)), BucketArrays(mx.array(positions), arrays, slots)


class _GivenPlans:
    """StepPlans whose arrays are a graph's inputs."""

    def __init__(self, bucket: Bucket, plans: Sequence[Sequence[mx.array]]) -> None:
        self._plans = {
            place.key: AttentionPlan(
                (DecodePlan(place.key[1], place.variant, bucket.rows, bucket.rows, 1, place.partitions, *arrays),),
                None,
            )
            for place, arrays in zip(bucket.plans, plans, strict=True)
        }

    def slots(self, group: int) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError("where each sequence has one row, attention stores it")

    def attention(self, key: PlanKey) -> AttentionPlan:
        """See StepPlans.attention."""
        return self._plans[key]

    def by_operations(self) -> GatheredStep:
        """Raises RuntimeError."""
        raise RuntimeError("attention by operations has no graph that serves another step")


Graph = Callable[..., tuple[mx.array, list[mx.array]]]
Tracer = Callable[[Graph], Graph]


def compiled(graph: Graph) -> Graph:
    """Traced by MLX at the first call."""
    traced: Graph = mx.compile(graph)
    return traced


def rows_of(outputs: mx.array, wanted: np.ndarray) -> mx.array:
    """Of outputs (T, ...) of all rows those that are `wanted`, int32 (N,)."""
    return outputs if len(wanted) == outputs.shape[0] else outputs[mx.array(wanted)]


class DecodeGraphs:
    """Graphs of one model's decode steps over one pool, the least recently used of which go.

    Attributes:
        traced: buckets that were traced so far.
    """

    def __init__(
        self,
        model: RowsModel,
        attention: KernelAttention,
        states: GraphStates | None = None,
        trace: Tracer = compiled,
    ) -> None:
        """Args:
        attention: `whole`. states: of a hybrid model's gated-delta layers.
        trace: keeps what a function of arrays builds, so that another call costs no Python.
        """
        self._model = model
        self._attention = attention
        self._states = states
        self._trace = trace
        self._graphs: OrderedDict[Bucket, Graph] = OrderedDict()
        self._refused = False
        self.traced = 0

    def run(self, batch: Batch, inputs: mx.array) -> mx.array | None:
        """Outputs (T, width) of all T rows, lazily; their K and V are stored with them.

        Args:
            inputs: token ids int32 (T,), or on a later stage hidden states (T, hidden_size).

        Returns:
            None where a graph does not do: some sequence has more than one row, no layer has yet asked for a plan (the
            first step of a model), or the model cannot be traced, which one log line says.
        """
        kernels = self._attention.kernels
        if self._refused or not kernels.asked or any(sequence.length > 1 for sequence in batch.sequences):
            return None
        bucket, arrays = bucket_of(kernels, self._states, batch)
        count = len(batch.sequences)
        if bucket.rows > count:
            padding = mx.zeros((bucket.rows - count, *inputs.shape[1:]), inputs.dtype)
            inputs = mx.concatenate([inputs, padding])
        chains = self._chains()
        given = inputs, arrays.positions, arrays.plans, arrays.slots, [ordered.token for ordered in chains]
        graph = self._graphs.get(bucket)
        if graph is None:
            ran = self._first(bucket, given)
            if ran is None:
                return None
            output, tokens = ran
        else:
            self._graphs.move_to_end(bucket)
            output, tokens = graph(*given)
        for ordered, token in zip(chains, tokens, strict=True):
            ordered.join(token)
        return output[:count] if bucket.rows > count else output

    def _chains(self) -> list[Ordered]:
        """All that a step writes in place: attention's buffers, then states."""
        return [*self._attention.kernels.ordered.values(), *(self._states.ordered if self._states else ())]

    def _first(self, bucket: Bucket, given: tuple[object, ...]) -> tuple[mx.array, list[mx.array]] | None:
        """Trace and run; None if that fails."""
        graph = self._trace(self._graph(bucket))
        try:
            ran = graph(*given)
        except (ValueError, RuntimeError) as error:  # a model that looks at values, or an operation without a trace
            self._refused = True
            logger.info("decode steps are built one by one, for the model cannot be traced: %s", error)
            return None
        self._graphs[bucket] = graph
        if len(self._graphs) > MOST_GRAPHS:
            self._graphs.popitem(last=False)
        self.traced += 1
        return ran

    def _graph(self, bucket: Bucket) -> Graph:
        kernels, states, model = self._attention.kernels, self._states, self._model
        rows = np.arange(bucket.rows, dtype=np.int32)

        def graph(
            inputs: mx.array,
            positions: mx.array,
            plans: list[list[mx.array]],
            slots: list[mx.array],
            tokens: list[mx.array],
        ) -> tuple[mx.array, list[mx.array]]:
            branches = [ordered.branch(token) for ordered, token in zip(self._chains(), tokens, strict=True)]
            of_attention = len(kernels.ordered)
            buffers = dict(zip(kernels.ordered, branches[:of_attention], strict=True))
            step: StepAttention = KernelStep(kernels, _GivenPlans(bucket, plans), buffers, starts=False)
            if states is not None:
                step = HybridStep(step, states.step(bucket.rows, slots, branches[of_attention:]))
            output = model(inputs, positions, step, rows)
            return output, [branch.token for branch in branches]

        return graph


def wanted_rows(batch: Batch) -> np.ndarray:
    """`batch.logit_rows`, or one: a step in the middle of a prompt wants none, but that keeps the graph whole and costs
    one row of the head."""
    return batch.logit_rows if len(batch.logit_rows) else np.zeros(1, np.int32)


def run_rows(
    model: RowsModel,
    backend: AttentionBackend,
    graphs: DecodeGraphs | None,
    batch: Batch,
    inputs: mx.array,
    *,
    head: bool,
) -> mx.array:
    """Compute a step, lazily: by a graph where one does, else by a graph of its own.

    Args:
        head: the model ends in logits; else it gives hidden states.

    Returns:
        Logits of `batch.logit_rows`, or of one row if none are wanted; hidden states of all rows.
    """
    rows = wanted_rows(batch)
    every_row = None if graphs is None else graphs.run(batch, inputs)
    if every_row is None:
        return model(inputs, batch.positions, backend.prepare(batch), rows)
    return rows_of(every_row, rows) if head else every_row
