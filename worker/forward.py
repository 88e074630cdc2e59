"""From a batch of rows to logits: over the paged pool, or over one contiguous mlx-lm cache per request.

    Batch, token ids --Forward.run--> logits of Batch.logit_rows

Both do the same to the same model; VLLM_METAL_USE_PAGED_ATTENTION chooses. The contiguous one runs request by request
the way mlx-lm does, so it takes every model that mlx-lm runs, and it is what the paged one is compared with.
"""

from collections.abc import Iterable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs, run_rows, wanted_rows
from pomarium.worker.batch import Batch
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.models.paged import PagedModel
from pomarium.worker.vision.merge import Sight


class Forward(Protocol):
    """A model over some KV cache."""

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """Logits (N, vocab_size) of the N `batch.logit_rows`, computed or on their way; K and V of every row are cached
        with them.

        Args:
            token_ids: int32 (T,), `batch.token_ids` with what is still on the device in its place.
        """
        ...

    def release(self, request_ids: Iterable[str]) -> None:
        """Forget what is cached of finished requests outside vLLM's blocks."""
        ...


class PagedForward:
    """All rows at once, K and V in vLLM's blocks.

    Args:
        graphs: of decode steps; None: each step's graph is built.
        queues: a step may be queued behind one that has not ended; else it is waited for.
        sight: gives rows the embeddings of images; None: the model takes none.
    """

    def __init__(
        self,
        model: PagedModel,
        backend: AttentionBackend,
        graphs: DecodeGraphs | None = None,
        queues: bool = False,
        sight: Sight | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._graphs = graphs
        self._queues = queues
        self._sight = sight

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """See Forward.run."""
        if batch.pictures:
            logits = self._with_pictures(batch, token_ids)
        else:
            logits = run_rows(self._model, self._backend, self._graphs, batch, token_ids, head=True)
        # A chunk in the middle of a prompt is waited for: its time is to be known, and nothing follows from it.
        if self._queues and len(batch.logit_rows):
            mx.async_eval(logits, self._backend.arrays)  # type: ignore[no-untyped-call]
        else:
            # Before the next step is queued, else MLX copies the pool instead of writing into it (kv_cache.pool).
            mx.eval(logits, self._backend.arrays)
        return logits[: len(batch.logit_rows)]

    def _with_pictures(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """A step with rows of images is no decode step, so no graph does it."""
        assert self._sight is not None  # else the engine knows of no images
        embeddings = self._sight.embeddings(token_ids, batch.pictures)
        return self._model(token_ids, batch.positions, self._backend.prepare(batch), wanted_rows(batch), embeddings)

    def release(self, request_ids: Iterable[str]) -> None:
        """Nothing to do: the scheduler owns the blocks."""


class ContiguousForward:
    """Request by request, each with the cache that mlx-lm makes for the model."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._caches: dict[str, list[object]] = {}

    def run(self, batch: Batch, token_ids: mx.array) -> mx.array:
        """See Forward.run.

        Raises:
            ValueError: if a sequence goes on from tokens that this cache never saw (a prefix-cache hit).
        """
        wanted = set(batch.logit_rows.tolist())
        outputs: list[mx.array] = []
        first = 0
        for sequence in batch.sequences:
            if sequence.start == 0:
                self._caches[sequence.request_id] = make_prompt_cache(self._module)
            elif sequence.request_id not in self._caches:
                raise ValueError(f"request {sequence.request_id} starts at {sequence.start} without a contiguous cache")
            end = first + sequence.length
            tokens = token_ids[first:end][None]
            logits = self._module(tokens, cache=self._caches[sequence.request_id])[0]
            rows = [row - first for row in range(first, end) if row in wanted]
            # The rows that nobody wants are let go here, not kept alive by a view until the step's end.
            mx.eval(picked := logits[mx.array(rows, mx.int32)] if rows else logits[:0])
            outputs.append(picked)
            first = end
        return mx.concatenate(outputs)

    def release(self, request_ids: Iterable[str]) -> None:
        """Drop the caches of these requests."""
        for request_id in request_ids:
            self._caches.pop(request_id, None)


def contiguous_layer(module: nn.Module) -> tuple[LayerCache, mx.Dtype]:
    """One layer that stands for all of mlx-lm's caches, and their dtype: what the scheduler accounts per token.

    A lazy run of one token, which computes nothing, fills the caches. States of constant size (recurrent layers) do not
    count, and a rotating cache counts as if it grew: an estimate from above.
    """
    caches = make_prompt_cache(module)
    module(mx.zeros((1, 1), mx.int32), cache=caches)
    width, dtype = 0, mx.float32
    for cache in caches:
        for leaf in cache.caches if isinstance(cache, CacheList) else (cache,):
            if isinstance(leaf, KVCache | RotatingKVCache):
                dtype = leaf.keys.dtype
                width += leaf.keys.shape[1] * leaf.keys.shape[3] + leaf.values.shape[1] * leaf.values.shape[3]
    return LayerCache(1, max(1, -(-width // 2))), dtype
