"""Decode steps as graphs that are built once: the model's layers run without Python.

    Batch of one row per sequence --InGraphs.bucket--> Bucket (shapes), arrays (all that changes from step to step)
        --DecodeGraphs.run--> the bucket's graph, traced when it is first met --> outputs of the batch's rows, lazily

Python builds a layer's graph in about as long as a GPU computes it for one sequence. `mx.compile` keeps what was built;
it serves another step if that differs in nothing but the arrays which the graph takes. So a step is padded to a bucket:
rows that store nowhere and see no key, whose outputs nobody reads, and partitions without keys (paged_plan.room). The
pools are no inputs. Kernels write them in place, in the order of the tokens that go in and come out (kernels.ordered).
"""

import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from pomarium.kernels.paged_plan import room
from pomarium.worker.attention.base import AttentionBackend, InGraphs, StepAttention
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
class Bucket:
    """What steps that share a graph agree in. rows: sequences and those that they are padded to. agreed: hashable."""

    rows: int
    agreed: Any


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

    def __init__(self, model: RowsModel, attention: InGraphs, trace: Tracer = compiled) -> None:
        """`trace`: keeps what a function of arrays builds, so that another call costs no Python."""
        self._model = model
        self._attention = attention
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
        if self._refused or any(sequence.length > 1 for sequence in batch.sequences):
            return None
        count = len(batch.sequences)
        rows = room(count)
        found = self._attention.bucket(batch, rows)
        if found is None:
            return None
        agreed, arrays = found
        bucket = Bucket(rows, agreed)
        positions = np.zeros(rows, np.int32)
        positions[:count] = batch.positions
        if rows > count:
            padding = mx.zeros((rows - count, *inputs.shape[1:]), inputs.dtype)
            inputs = mx.concatenate([inputs, padding])
        chains = self._attention.ordered
        given = inputs, mx.array(positions), arrays, [ordered.token for ordered in chains]
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
        return output[:count] if rows > count else output

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
        attention, model = self._attention, self._model
        rows = np.arange(bucket.rows, dtype=np.int32)

        def graph(
            inputs: mx.array, positions: mx.array, arrays: list[list[mx.array]], tokens: list[mx.array]
        ) -> tuple[mx.array, list[mx.array]]:
            branches = [ordered.branch(token) for ordered, token in zip(attention.ordered, tokens, strict=True)]
            step = attention.step(bucket.rows, bucket.agreed, arrays, branches)
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
