"""What a stage holds of a model's weights: which parameters are another stage's, and what stands in their place.

    lazily loaded module, StageCut --foreign_parameters--> names --load--> blank

A blank is right in shape and dtype, a few bytes in size and not a number in value: the module stays whole for its own
code, nothing of another stage is read or held, and a result that did depend on it could not pass for a right one.
"""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from pomarium.worker.models.stages import (
    LayerHooks,
    LayerTrace,
    StageCut,
    as_classes,
    layers_of,
    subclass,
    unknown_embeddings,
)


def foreign_parameters(module: nn.Module, cut: StageCut, model_type: str) -> frozenset[str]:
    """Names (of `module.parameters()`, flattened) of what a stage does not need; a lazy run of one token tells.

    Parameters of layers belong to the stage of the layer. Of the others, what the run uses before the first layer
    belongs to the first stage, what it uses after the last layer to the last one (a tied embedding to both), what it
    uses in between to all, and what it does not use to none.

    Raises:
        NotCuttableError: the model cannot run in stages.
    """
    layers = layers_of(module)
    inside = {id(part) for layer in layers for part in layer.modules()}
    outside = [part for part in module.modules() if id(part) not in inside]
    trace, used = LayerTrace(len(layers), model_type), set[int]()

    def note(part: nn.Module, value: object) -> None:
        if isinstance(value, mx.array) and (
            (trace.before and cut.has_embedding) or (trace.after and cut.has_head) or not (trace.before or trace.after)
        ):
            used.add(id(part))

    with as_classes([(part, _watched(type(part), note)) for part in outside]):
        with LayerHooks(module).visited_by(trace), unknown_embeddings(module):
            module(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(module))
        trace.hidden_size()
    own = {id(part) for index, layer in enumerate(layers) if cut.owns(index) for part in layer.modules()} | used
    foreign = set()
    for path, part in module.named_modules():
        if id(part) not in own:
            names = (name for name, value in part.items() if isinstance(value, mx.array))
            foreign |= {f"{path}.{name}" if path else name for name in names}
    return frozenset(foreign & {name for name, _ in tree_flatten(module.parameters())})


def _watched(base: type[nn.Module], note: Callable[[nn.Module, object], None]) -> type[nn.Module]:
    """A subclass that tells `note` of each member that is looked up (nn.Module keeps its members as a dict's items)."""

    def getitem(part: nn.Module, key: str) -> object:
        value = dict.__getitem__(part, key)
        note(part, value)
        return value

    def get(part: nn.Module, key: str, default: object = None) -> object:
        value = dict.get(part, key, default)
        note(part, value)
        return value

    return subclass(base, {"__getitem__": getitem, "get": get})


def blank(parameter: mx.array) -> mx.array:
    """What stands for a parameter of another stage: of its shape and dtype, all not-a-number (zero if integral)."""
    value = math.nan if mx.issubdtype(parameter.dtype, mx.floating) else 0
    return mx.broadcast_to(mx.array(value, parameter.dtype), parameter.shape)
