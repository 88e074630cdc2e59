"""An mlx-lm model made ready for the paged cache: what its layers keep, and one call from rows to logits.

    nn.Module --prepare--> PagedModel.layers --(vLLM)--> pool --PagedModel(rows, StepAttention)--> logits
              --prepare_stage--> StageModel.layers (its own) --> pool --> hidden states, or logits on the last stage

Both find the facts by asking the model: the kinds of cache it makes tell the windows, and a lazy dry run of two rows,
which computes nothing, tells K's and V's shapes and that every layer attends through the seam exactly once. A stage's
dry run goes through all layers, whoever owns them, and also tells which cache entries are its own. What fails is
refused by name.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.models.inline_attention import reroute_inline_attention
from pomarium.worker.models.rows import HeadRows, RowCache, route_attention
from pomarium.worker.models.stages import (
    LayerHooks,
    LayerTrace,
    NotCuttableError,
    Passage,
    StageCut,
    layers_of,
    unknown_embeddings,
)

WAY_OUT = "set VLLM_METAL_USE_PAGED_ATTENTION=0 to run it with mlx-lm's contiguous cache"


@dataclass(frozen=True)
class PagedModel:
    """A model whose attention goes through StepAttention.

    Attributes:
        layers: indexed by cache entry. vocab_size: width of the logits. dtype: of K and V.
    """

    module: nn.Module
    layers: tuple[LayerCache, ...]
    vocab_size: int
    dtype: mx.Dtype
    head: HeadRows

    def __call__(self, token_ids: np.ndarray, positions: np.ndarray, step: StepAttention, rows: np.ndarray) -> mx.array:
        """Logits (N, vocab_size) of the rows int32 (N,) of T rows int32 (T,) each of token ids and positions."""
        offset = mx.array(positions)
        caches = [RowCache(index, layer.window, offset, step) for index, layer in enumerate(self.layers)]
        logits = self.head.run(self.module, mx.array(token_ids)[:, None], caches, mx.array(rows))
        return logits[:, 0]


@dataclass(frozen=True)
class StageModel:
    """One pipeline stage of a model whose attention goes through StepAttention.

    Attributes:
        module: the whole model; `cut` says which of its layers are computed.
        layers: of the stage's own attention, numbered from 0; what its pool holds and its StepAttention is asked for.
        entries: for each entry of the model's cache list its window, and its index in `layers` or None if foreign.
        vocab_size, hidden_size: widths of logits and hidden states. dtype: of K and V.
        received: dtype of the hidden states that enter the stage; None where token ids do.
    """

    module: nn.Module
    cut: StageCut
    layers: tuple[LayerCache, ...]
    entries: tuple[tuple[int | None, int | None], ...]
    vocab_size: int
    hidden_size: int
    dtype: mx.Dtype
    received: mx.Dtype | None
    head: HeadRows
    hooks: LayerHooks

    @property
    def own_entries(self) -> tuple[int, ...]:
        """The model's cache entries that are this stage's, in the order of `layers`."""
        return tuple(entry for entry, (own, _) in enumerate(self.entries) if own is not None)

    def __call__(
        self, inputs: np.ndarray | mx.array, positions: np.ndarray, step: StepAttention, rows: np.ndarray
    ) -> mx.array:
        """Run T rows through the stage's layers.

        Args:
            inputs: token ids int32 (T,) on the first stage, else the hidden states (T, hidden_size) handed on to it.
            positions: int32 (T,). rows: int32 (N,), whose logits are wanted; for the last stage only.

        Returns:
            Logits (N, vocab_size) of `rows` on the last stage, else the hidden states (T, hidden_size) of all rows.
        """
        offset = mx.array(positions)
        caches = [self._row_cache(entry, offset, step) for entry in range(len(self.entries))]
        if self.cut.has_embedding:
            token_ids, received = mx.array(inputs)[:, None], None
        else:
            token_ids, received = mx.zeros((len(positions), 1), mx.int32), mx.array(inputs)[:, None]
        passage = Passage(self.cut, received)
        with self.hooks.visited_by(passage):
            if self.cut.has_head:
                return self.head.run(self.module, token_ids, caches, mx.array(rows))[:, 0]
            self.module(token_ids, cache=caches)
        assert passage.handed_on is not None  # the dry run saw every layer run
        return passage.handed_on[:, 0]

    def _row_cache(self, entry: int, offset: mx.array, step: StepAttention) -> RowCache:
        own, window = self.entries[entry]
        return RowCache(entry, window, offset, _Foreign()) if own is None else RowCache(own, window, offset, step)


class _Foreign:
    """StepAttention of layers that another stage computes: their caches lend positions to masks, nothing attends."""

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError(f"cache entry {layer} belongs to another stage")


@dataclass
class _DryRun:
    """A StepAttention that records what each layer brings, and within which layer of `trace` if there is one."""

    trace: LayerTrace | None = None
    seen: dict[int, tuple[tuple[int, ...], tuple[int, ...], mx.Dtype]] = field(default_factory=dict)
    layer_of: dict[int, int] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        if layer in self.seen:
            raise UnsupportedError(f"layer {layer} attends twice in a step")
        self.seen[layer] = (keys.shape, values.shape, keys.dtype)
        if self.trace is not None:
            if self.trace.current is None:
                raise UnsupportedError(f"cache entry {layer} is attended to outside of the layers")
            self.layer_of[layer] = self.trace.current
        return mx.zeros((*queries.shape[:2], values.shape[-1]), queries.dtype)


def prepare(module: nn.Module, model_type: str) -> PagedModel:
    """Make `module` (mlx-lm's, loaded) run over a paged cache.

    Raises:
        UnsupportedError: names `model_type`, what of it does not fit, and the flag to change.
    """
    return _prepare(module, model_type, _DryRun())


def prepare_stage(module: nn.Module, model_type: str, cut: StageCut) -> StageModel:
    """Make the layers `cut` of `module` (mlx-lm's, loaded whole or with this cut) run over a paged cache.

    Raises:
        UnsupportedError: names `model_type` and what of it does not fit; the same for every cut.
        ValueError: `cut` is of another number of layers.
    """
    if (held := len(layers_of(module))) != cut.num_layers:
        raise ValueError(f"a cut of {cut.num_layers} layers does not fit a model of {held}")
    hooks, trace = LayerHooks(module), LayerTrace(cut.num_layers, model_type)
    dry = _DryRun(trace)
    with hooks.visited_by(trace), unknown_embeddings(module):
        whole = _prepare(module, model_type, dry)
    hidden_size = trace.hidden_size()
    own = [entry for entry in range(len(whole.layers)) if cut.owns(dry.layer_of[entry])]
    layers = tuple(whole.layers[entry] for entry in own)
    entries = tuple(
        (own.index(entry) if entry in own else None, layer.window) for entry, layer in enumerate(whole.layers)
    )
    received = None if cut.has_embedding else trace.dtypes[cut.first - 1]
    return StageModel(
        module, cut, layers, entries, whole.vocab_size, hidden_size, whole.dtype, received, whole.head, hooks
    )


def _prepare(module: nn.Module, model_type: str, dry: _DryRun) -> PagedModel:
    windows = [_window(cache, model_type) for cache in make_prompt_cache(module)]
    route_attention(module)
    reroute_inline_attention(module)
    head = HeadRows(module)
    offset = mx.array([0, 1], mx.int32)
    caches = [RowCache(index, window, offset, dry) for index, window in enumerate(windows)]
    try:
        logits = head.run(module, mx.zeros((2, 1), mx.int32), caches, mx.array([1], mx.int32))
    except NotCuttableError:
        raise
    except UnsupportedError as error:
        raise _refusal(model_type, str(error)) from error
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise _refusal(model_type, f"it does not run row by row ({type(error).__name__}: {error})") from error
    if missing := [str(index) for index in range(len(windows)) if index not in dry.seen]:
        raise _refusal(model_type, f"layers {', '.join(missing)} do not attend through scaled_dot_product_attention")
    layers = []
    for index, window in enumerate(windows):
        keys, values, _ = dry.seen[index]
        if keys != values:
            raise _refusal(model_type, f"layer {index} caches keys {keys[1:]} and values {values[1:]} of unequal shape")
        layers.append(LayerCache(keys[1], keys[2], window))
    if logits.shape[:2] != (1, 1):
        raise _refusal(model_type, f"its logits have shape {logits.shape} instead of one row per token")
    return PagedModel(module, tuple(layers), logits.shape[-1], dry.seen[0][2], head)


def _window(cache: KVCache | RotatingKVCache, model_type: str) -> int | None:
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise _refusal(model_type, f"it keeps a {type(cache).__name__}, which the paged cache does not hold")


def _refusal(model_type: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"model type {model_type!r} does not run on the paged KV cache: {reason}; {WAY_OUT}")
