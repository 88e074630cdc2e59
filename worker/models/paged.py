"""An mlx-lm model made ready for the paged cache: what its layers keep, and one call from rows to logits.

    nn.Module --prepare--> PagedModel.layers --(vLLM)--> pool --PagedModel(rows, StepAttention)--> logits
              --prepare_stage--> StageModel.layers (its own) --> pool --> hidden states, or logits on the last stage

Both find the facts by asking the model: the kinds of cache it makes tell the windows and which layers keep a state
(models.gated_delta), and a lazy dry run of two rows, which computes nothing, tells the shapes of K, V and states and
that every layer that keeps something goes through its seam exactly once; others may attend over what it keeps
(models.shared_kv). A stage's dry run goes through all layers, whoever owns them, and also tells which cache entries are
its own. What fails is refused by name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.base import StepAttention
from pomarium.worker.attention.hybrid import HybridStep
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.kv_cache.layout import LayerCache
from pomarium.worker.kv_cache.states import StateCache
from pomarium.worker.models.gated_delta import (
    ForeignStates,
    StateDryRun,
    StateRows,
    gated_delta_entries,
    reroute_gated_delta,
    states_of,
)
from pomarium.worker.models.inline_attention import reroute_inline_attention
from pomarium.worker.models.mla import reroute_latent_attention
from pomarium.worker.models.rows import HeadRows, RowCache, route_attention
from pomarium.worker.models.shared_kv import reroute_shared_attention
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
        layers: of attention, in the order of the model's cache list. states: of its gated-delta layers, likewise.
        entries: for each entry of the cache list its index in `layers` and its window; (None, None) for a state.
        state_entries: entry of the cache list -> index in `states`.
        vocab_size: width of the logits. dtype: of K and V.
    """

    module: nn.Module
    layers: tuple[LayerCache, ...]
    entries: tuple[tuple[int | None, int | None], ...]
    vocab_size: int
    dtype: mx.Dtype
    head: HeadRows
    states: tuple[StateCache, ...] = ()
    state_entries: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def own_entries(self) -> tuple[int, ...]:
        """The entries of `layers`, in their order."""
        return _own(self.entries)

    def __call__(
        self,
        inputs: np.ndarray | mx.array,
        positions: np.ndarray | mx.array,
        step: StepAttention,
        rows: np.ndarray | mx.array,
        embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits (N, vocab_size) of the rows int32 (N,) of T rows int32 (T,) each of token ids and positions.

        Args:
            embeddings: (T, hidden_size) of the rows, where they are not those of the token ids.
        """
        offset = mx.array(positions)
        caches = _row_caches(self.entries, self.state_entries, offset, step)
        given = None if embeddings is None else embeddings[:, None]
        logits = self.head.run(self.module, mx.array(inputs)[:, None], caches, mx.array(rows), given)
        return logits[:, 0]


@dataclass(frozen=True)
class StageModel:
    """One pipeline stage of a model whose attention goes through StepAttention.

    Attributes:
        module: the whole model; `cut` says which of its layers are computed.
        layers: of the stage's own attention, numbered from 0; what its pool holds and its StepAttention is asked for.
        states: of the stage's own gated-delta layers, likewise.
        entries: for each entry of the model's cache list its index in `layers` or None if foreign or a state, and its
            window. state_entries: entry of the cache list -> index in `states`, or None if foreign.
        vocab_size, hidden_size: widths of logits and hidden states. dtype: of K and V.
        received: dtype of the hidden states that enter the stage; None where token ids do.
        beside: what each of the model's layers returns beside the hidden state (see stages.LayerTrace).
        whole: what all stages together keep.
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
    beside: tuple[int, ...]
    whole: PagedModel
    states: tuple[StateCache, ...] = ()
    state_entries: Mapping[int, int | None] = field(default_factory=dict)

    @property
    def own_entries(self) -> tuple[int, ...]:
        """The model's cache entries that are this stage's, in the order of `layers`."""
        return _own(self.entries)

    def __call__(
        self,
        inputs: np.ndarray | mx.array,
        positions: np.ndarray | mx.array,
        step: StepAttention,
        rows: np.ndarray | mx.array,
    ) -> mx.array:
        """Run T rows through the stage's layers.

        Args:
            inputs: token ids int32 (T,) on the first stage, else the hidden states (T, hidden_size) handed on to it.
            positions: int32 (T,). rows: int32 (N,), whose logits are wanted; for the last stage only.

        Returns:
            Logits (N, vocab_size) of `rows` on the last stage, else the hidden states (T, hidden_size) of all rows.
        """
        offset = mx.array(positions)
        caches = _row_caches(self.entries, self.state_entries, offset, step)
        if self.cut.has_embedding:
            token_ids, received = mx.array(inputs)[:, None], None
        else:
            token_ids, received = mx.zeros((len(positions), 1), mx.int32), mx.array(inputs)[:, None]
        passage = Passage(self.cut, received, self.beside)
        with self.hooks.visited_by(passage):
            if self.cut.has_head:
                return self.head.run(self.module, token_ids, caches, mx.array(rows))[:, 0]
            self.module(token_ids, cache=caches)
        assert passage.handed_on is not None  # the dry run saw every layer run
        return passage.handed_on[:, 0]


def _own(entries: Sequence[tuple[int | None, int | None]]) -> tuple[int, ...]:
    return tuple(entry for entry, (own, _) in enumerate(entries) if own is not None)


def _row_caches(
    entries: Sequence[tuple[int | None, int | None]],
    state_entries: Mapping[int, int | None],
    offset: mx.array,
    step: StepAttention,
) -> list[RowCache | StateRows]:
    caches: list[RowCache | StateRows] = []
    for entry, (own, window) in enumerate(entries):
        if entry in state_entries:
            state = state_entries[entry]
            caches.append(StateRows(entry, ForeignStates()) if state is None else StateRows(state, states_of(step)))
        elif own is None:
            caches.append(RowCache(entry, window, offset, _Foreign()))
        else:
            caches.append(RowCache(own, window, offset, step))
    return caches


class _Foreign:
    """StepAttention of layers that another stage computes: their caches lend positions to masks, nothing attends."""

    def attend(self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError(f"cache entry {layer} belongs to another stage")

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError(f"cache entry {layer} belongs to another stage")

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        """Raises RuntimeError."""
        raise RuntimeError(f"cache entry {layer} belongs to another stage")


@dataclass(frozen=True)
class _Kept:
    """What a layer brings to be kept: a LayerCache without its window, and the dtype."""

    num_kv_heads: int
    head_dim: int
    value_dim: int
    latent: bool
    dtype: mx.Dtype

    def layer(self, window: int | None) -> LayerCache:
        value_width = None if self.value_dim == self.head_dim else self.value_dim
        return LayerCache(self.num_kv_heads, self.head_dim, window, value_width, self.latent)


@dataclass
class _DryRun:
    """A StepAttention that records what each layer brings, and within which layer of `trace` if there is one."""

    trace: LayerTrace | None = None
    seen: dict[int, _Kept] = field(default_factory=dict)
    layer_of: dict[int, int] = field(default_factory=dict)

    def attend(
        self,
        layer: int,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scoring: Scoring,
    ) -> mx.array:
        if values.shape[:2] != keys.shape[:2]:
            raise UnsupportedError(f"layer {layer} caches keys {keys.shape[1:]} and values {values.shape[1:]}")
        self._keep(layer, _Kept(keys.shape[1], keys.shape[2], values.shape[2], False, keys.dtype))
        return mx.zeros((*queries.shape[:2], values.shape[-1]), queries.dtype)

    def attend_shared(
        self, layer: int, queries: mx.array, keys: mx.array, values: mx.array, scoring: Scoring
    ) -> mx.array:
        if layer not in self.seen:
            raise UnsupportedError(f"layer {layer} is attended to before it stores its keys and values")
        return mx.zeros((*queries.shape[:2], values.shape[-1]), queries.dtype)

    def attend_latents(self, layer: int, queries: mx.array, latents: mx.array, rank: int, scoring: Scoring) -> mx.array:
        self._keep(layer, _Kept(1, latents.shape[1], rank, True, latents.dtype))
        return mx.zeros((*queries.shape[:2], rank), queries.dtype)

    def _keep(self, layer: int, kept: _Kept) -> None:
        if layer in self.seen:
            raise UnsupportedError(f"layer {layer} attends twice in a step")
        self.seen[layer] = kept
        if self.trace is not None:
            if self.trace.current is None:
                raise UnsupportedError(f"cache entry {layer} is attended to outside of the layers")
            self.layer_of[layer] = self.trace.current


def prepare(module: nn.Module, model_type: str) -> PagedModel:
    """Make `module` (mlx-lm's, loaded) run over a paged cache.

    Raises:
        UnsupportedError: names `model_type`, what of it does not fit, and the flag to change.
    """
    return _prepare(module, model_type, _DryRun(), StateDryRun())


def prepare_stage(module: nn.Module, model_type: str, cut: StageCut) -> StageModel:
    """Make the layers `cut` of `module` (mlx-lm's, loaded whole or with this cut) run over a paged cache.

    Raises:
        UnsupportedError: names `model_type` and what of it does not fit; the same for every cut.
        ValueError: `cut` is of another number of layers.
    """
    if (held := len(layers_of(module))) != cut.num_layers:
        raise ValueError(f"a cut of {cut.num_layers} layers does not fit a model of {held}")
    hooks, trace = LayerHooks(module), LayerTrace(cut.num_layers, model_type)
    dry, dry_states = _DryRun(trace), StateDryRun(trace)
    with hooks.visited_by(trace), unknown_embeddings(module):
        whole = _prepare(module, model_type, dry, dry_states)
    hidden_size = trace.hidden_size()
    own = [entry for entry in whole.own_entries if cut.owns(dry.layer_of[entry])]
    own_states = [entry for entry in whole.state_entries if cut.owns(dry_states.layer_of[entry])]
    layers = tuple(dry.seen[entry].layer(whole.entries[entry][1]) for entry in own)
    entries = tuple(
        (own.index(entry) if entry in own else None, window) for entry, (_, window) in enumerate(whole.entries)
    )
    states = tuple(dry_states.seen[entry] for entry in own_states)
    state_entries = {entry: own_states.index(entry) if entry in own_states else None for entry in whole.state_entries}
    received = None if cut.has_embedding else trace.dtypes[cut.first - 1]
    return StageModel(
        module,
        cut,
        layers,
        entries,
        whole.vocab_size,
        hidden_size,
        whole.dtype,
        received,
        whole.head,
        hooks,
        tuple(trace.beside),
        whole,
        states,
        state_entries,
    )


def _prepare(module: nn.Module, model_type: str, dry: _DryRun, dry_states: StateDryRun) -> PagedModel:
    made = make_prompt_cache(module)
    states = gated_delta_entries(module, made)
    windows = {entry: _window(cache, model_type) for entry, cache in enumerate(made) if entry not in states}
    if not windows:
        raise _refusal(model_type, "none of its layers attends")
    route_attention(module)
    reroute_inline_attention(module)
    reroute_latent_attention(module)
    reroute_shared_attention(module)
    reroute_gated_delta(module)
    head = HeadRows(module)
    caches = _row_caches(
        [(entry, windows[entry]) if entry in windows else (None, None) for entry in range(len(made))],
        {entry: entry for entry in states},
        mx.array([0, 1], mx.int32),
        HybridStep(dry, dry_states),
    )
    try:
        logits = head.run(module, mx.zeros((2, 1), mx.int32), caches, mx.array([1], mx.int32))
    except NotCuttableError:
        raise
    except UnsupportedError as error:
        raise _refusal(model_type, str(error)) from error
    except (TypeError, ValueError, AttributeError, IndexError, NotImplementedError) as error:
        raise _refusal(model_type, f"it does not run row by row ({type(error).__name__}: {error})") from error
    if missing := [str(entry) for entry in windows if entry not in dry.seen]:
        raise _refusal(model_type, f"layers {', '.join(missing)} do not attend through scaled_dot_product_attention")
    if missing := [str(entry) for entry in states if entry not in dry_states.seen]:
        raise _refusal(model_type, f"layers {', '.join(missing)} keep a state and are not gated-delta layers")
    order = list(windows)
    entries = tuple(
        (order.index(entry), windows[entry]) if entry in windows else (None, None) for entry in range(len(made))
    )
    if logits.shape[:2] != (1, 1):
        raise _refusal(model_type, f"its logits have shape {logits.shape} instead of one row per token")
    return PagedModel(
        module,
        tuple(dry.seen[entry].layer(window) for entry, window in windows.items()),
        entries,
        logits.shape[-1],
        dry.seen[order[0]].dtype,
        head,
        tuple(dry_states.seen[entry] for entry in states),
        {entry: index for index, entry in enumerate(states)},
    )


def _window(cache: KVCache | RotatingKVCache, model_type: str) -> int | None:
    if type(cache) is KVCache:
        return None
    if type(cache) is RotatingKVCache and cache.keep == 0:
        return int(cache.max_size)
    raise _refusal(model_type, f"it keeps a {type(cache).__name__}, which the paged cache does not hold")


def _refusal(model_type: str, reason: str) -> UnsupportedError:
    return UnsupportedError(f"model type {model_type!r} does not run on the paged KV cache: {reason}; {WAY_OUT}")
