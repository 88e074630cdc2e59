"""The layers of one stage over its part of the paged KV cache.

first stage:   Batch.token_ids          --+
other stages:  hidden states (T, H) ------+--> own layers --> hidden states (T, H), or logits on the last stage
"""

from collections.abc import Iterable

import mlx.core as mx

from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs, run_rows
from pomarium.worker.batch import Batch
from pomarium.worker.models.paged import StageModel
from pomarium.worker.pipeline.links import StageLinks


class StageForward:
    """All rows of a step through one stage's layers. graphs: of decode steps; None: each step's graph is built."""

    def __init__(self, model: StageModel, backend: AttentionBackend, graphs: DecodeGraphs | None = None) -> None:
        self._model = model
        self._backend = backend
        self._graphs = graphs

    def run(self, batch: Batch, inputs: mx.array) -> mx.array:
        """Evaluated hidden states (T, hidden_size) of all rows, or on the last stage logits (N, vocab_size) of the N
        `batch.logit_rows`.

        Args:
            inputs: token ids int32 (T,) on the first stage, else hidden states (T, hidden_size).
        """
        last = self._model.cut.has_head
        output = run_rows(self._model, self._backend, self._graphs, batch, inputs, head=last)
        mx.eval(output, self._backend.arrays)  # before the next step's writes are queued: see kv_cache.pool
        return output[: len(batch.logit_rows)] if last else output


class LastStageForward:
    """A Forward (worker/forward.py) whose rows come from the stage before."""

    def __init__(self, stage: StageForward, links: StageLinks) -> None:
        self._stage = stage
        self._links = links

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """See Forward.run; the tokens are the first stage's. Raises HandoffError."""
        self._links.begin_step()
        return self._stage.run(batch, self._links.receive_hidden())

    def release(self, request_ids: Iterable[str]) -> None:
        """Nothing to do: the scheduler owns the blocks."""
