"""Cutting an unmodified mlx-lm model into pipeline stages: which layers a stage owns, and how only those are computed.

    received hidden state --(first own layer)--> own layers --(last own layer)--> hidden state to hand on
           or token ids      the other layers return what they got                or logits, on the last stage

The layer list keeps its full length, so that layer numbers, masks built from fixed cache entries and parameter names
stay what the model's code expects. During a run, and only then, each layer object has a one-off subclass whose call
goes through a `Visitor`: `Passage` computes a stage, `LayerTrace` finds out at no cost whether a model can be cut.

MLX is lazy, so what a stage's result does not depend on is never computed: the embedding behind the first stage, norm
and head before the last. `stage_weights` says which parameters those are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from pomarium.worker.errors import UnsupportedError

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


@dataclass(frozen=True)
class StageCut:
    """The half-open range [first, end) of a model's `num_layers` layers that one stage computes.

    Raises:
        ValueError: the range is empty or not within the layers.
    """

    first: int
    end: int
    num_layers: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end <= self.num_layers:
            raise ValueError(f"layers [{self.first}, {self.end}) are no stage of {self.num_layers} layers")

    @property
    def has_embedding(self) -> bool:
        """The stage takes token ids; the others take hidden states."""
        return self.first == 0

    @property
    def has_head(self) -> bool:
        """The stage gives logits; the others give hidden states."""
        return self.end == self.num_layers

    def owns(self, layer: int) -> bool:
        """Whether the stage computes `layer`."""
        return self.first <= layer < self.end


class NotCuttableError(UnsupportedError):
    """A model that cannot run in stages; the message names it and says why.

    Made of its message alone, as the executor makes it again in the engine (executor.codec).
    """


class Visitor(Protocol):
    """What a run does at each layer in place of calling it."""

    def __call__(self, index: int, hidden: mx.array, extras: object, layer: Callable[[mx.array], Any]) -> object:
        """What the model gets as the output of layer `index`: the hidden state, or a tuple that begins with it.

        Args:
            hidden: what the model gave it, (rows, length, hidden_size). extras: its other arguments.
            layer: computes it from a hidden state and those arguments.
        """
        ...


@dataclass
class _Post:
    """Where the visitor of the current run stands. The layers' subclasses refer to it and not to the model, so that
    nothing but its owner keeps the model alive (classes are freed late, by the cycle collector)."""

    visitor: Visitor | None = None


class LayerHooks:
    """Lets a Visitor stand at each layer of a model for the time of a run; between runs the model is mlx-lm's own."""

    def __init__(self, module: nn.Module) -> None:
        self._post = _Post()
        self._layers = [
            (layer, _hooked(type(layer), index, self._post)) for index, layer in enumerate(layers_of(module))
        ]

    @contextmanager
    def visited_by(self, visitor: Visitor) -> Iterator[None]:
        """Calls of the model go through `visitor` inside the context."""
        self._post.visitor = visitor
        try:
            with as_classes(self._layers):
                yield
        finally:
            self._post.visitor = None


def _hooked(base: type[nn.Module], index: int, post: _Post) -> type[nn.Module]:
    forward: Callable[..., Any] = base.__call__

    def call(layer: nn.Module, hidden: mx.array, *args: object, **kwargs: object) -> object:
        assert post.visitor is not None
        return post.visitor(index, hidden, (args, kwargs), lambda state: forward(layer, state, *args, **kwargs))

    return subclass(base, {"__call__": call})


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The layers of an mlx-lm model, by the property that all of them have."""
    return list(module.layers)


@contextmanager
def as_classes(swaps: Iterable[tuple[nn.Module, type[nn.Module]]]) -> Iterator[None]:
    """Objects have other classes inside the context. Attributes and isinstance keep working."""
    originals: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for module, replacement in swaps:
            originals.append((module, type(module)))
            module.__class__ = replacement
        yield
    finally:
        for module, original in reversed(originals):
            module.__class__ = original


def subclass(base: type[nn.Module], members: dict[str, object]) -> type[nn.Module]:
    """A one-off subclass with `members` in place of the class's own, of the same name and module."""
    return type(base.__name__, (base,), {"__module__": base.__module__, **members})


class Passage:
    """One run of a stage.

    Attributes:
        handed_on: output of the last own layer, (rows, length, hidden_size), once it ran.
    """

    def __init__(self, cut: StageCut, received: mx.array | None, beside: Sequence[int]) -> None:
        """Args:
        received: the hidden state that enters the first own layer; None where the embedding is owned.
        beside: of each layer, see LayerTrace.
        """
        self._cut = cut
        self._received = received
        self._beside = beside
        self.handed_on: mx.array | None = None

    def __call__(self, index: int, hidden: mx.array, extras: object, layer: Callable[[mx.array], Any]) -> object:
        """See Visitor."""
        count = self._beside[index]
        if not self._cut.owns(index):
            return (hidden, *[None] * count) if count else hidden
        entering = self._received if index == self._cut.first and self._received is not None else hidden
        output = layer(entering)
        if index == self._cut.end - 1:
            # A handle of its own: models may go on in place (`h *= ...`).
            self.handed_on = mx.array(output[0] if count else output)
        return output


class _Beside:
    """Stands for what a layer hands on beside the hidden state, so that it shows if another layer is given it."""


class LayerTrace:
    """A dry run through all layers that refuses what a cut would compute wrongly.

    Each layer hands on a constant of its own, so that it shows whether the next layer gets exactly that; the embedding
    gives not-a-numbers (`unknown_embeddings`), so that it shows whether a layer is given anything else made of tokens.
    Layers may hand on more than the hidden state if no other layer is given it (Gemma 4 without shared K and V).

    Attributes:
        current: the layer that is being computed, None outside of all.
        dtypes: of the hidden states that the layers handed on so far, by layer.
        beside: how many things each of them hands on beside it, in a tuple; 0 for those that return an array.
    """

    def __init__(self, num_layers: int, model_type: str) -> None:
        self.current: int | None = None
        self.dtypes: list[mx.Dtype] = []
        self.beside: list[int] = []
        self._num_layers = num_layers
        self._model_type = model_type
        self._done = 0
        self._width: int | None = None
        self._state: mx.array | None = None

    def __call__(self, index: int, hidden: mx.array, extras: object, layer: Callable[[mx.array], Any]) -> object:
        """See Visitor."""
        if index != self._done:
            raise self._refusal(f"layer {index} runs where layer {self._done} was expected")
        state = hidden if self._state is None else self._state
        if index and (hidden.shape != state.shape or not mx.all(hidden == _mark(index)).item()):
            raise self._refusal(f"it changes the hidden state between layers {index - 1} and {index}")
        given = [value for _, value in tree_flatten(extras)]
        if any(isinstance(value, _Beside) for value in given):
            raise self._refusal(f"layer {index} is given what an earlier one hands on beside the hidden state")
        arrays = [value for value in given if isinstance(value, mx.array)]
        if any(mx.issubdtype(a.dtype, mx.floating) and mx.any(mx.isnan(a)).item() for a in arrays):
            raise self._refusal(f"layer {index} is given more of the tokens than the hidden state")
        self.current = index
        returned = layer(state)
        self.current = None
        output, *others = returned if isinstance(returned, tuple) else (returned,)
        if not isinstance(output, mx.array) or output.shape != hidden.shape:
            raise self._refusal(f"layer {index} does not hand on the hidden state")
        self.beside.append(len(others))
        self._done, self._width = index + 1, output.shape[-1]
        self.dtypes.append(output.dtype)
        self._state = None if self.after else output  # else the graph behind it would keep all weights, as stored
        mark = mx.full(output.shape, _mark(index + 1), output.dtype)
        return (mark, *(_Beside() for _ in others)) if others else mark

    @property
    def before(self) -> bool:
        """No layer has run yet."""
        return self._done == 0 and self.current is None

    @property
    def after(self) -> bool:
        """All layers have run."""
        return self._done == self._num_layers

    def hidden_size(self) -> int:
        """Width of the hidden state.

        Raises:
            NotCuttableError: the run ended before its last layer.
        """
        if self._width is None or not self.after:
            raise self._refusal(f"it runs {self._done} of its {self._num_layers} layers")
        return self._width

    def _refusal(self, reason: str) -> NotCuttableError:
        return NotCuttableError(
            f"model type {self._model_type!r} cannot be cut into stages: {reason}; serve it with one stage."
        )


def _mark(index: int) -> int:
    return 1 + index % 128  # exact in bfloat16


@contextmanager
def unknown_embeddings(module: nn.Module) -> Iterator[None]:
    """Embedding layers of `module` look up not-a-numbers inside the context (as heads they stay what they are)."""

    def unknown(base: type[nn.Module]) -> type[nn.Module]:
        look_up: Callable[..., mx.array] = base.__call__

        def call(layer: nn.Module, token_ids: mx.array) -> mx.array:
            found = look_up(layer, token_ids)
            return mx.full(found.shape, math.nan, found.dtype)

        return subclass(base, {"__call__": call})

    with as_classes([(m, unknown(type(m))) for m in module.modules() if isinstance(m, _EMBEDDINGS)]):
        yield
