"""An mlx-lm directory -> a model in memory.

    inspect (headers) -> mlx_lm.load_model, lazily -> layer by layer: dequantise (dense) or cast, evaluate
                            |- its model put right before weights come (forms.mends)
                            '- before its `sanitize`: FP8 blocks made dense (fp8), experts stacked (experts), tensors
                               under other names (forms.tensors)

Nothing is read before its own layer's turn, so the peak is the finished model plus about one layer as stored. `dense`
is for the CPU device, where MLX multiplies quantised matrices on one thread and dense float32 through BLAS. Of a stage
only its own layers are read, with embedding or head if it has them; the rest is blank before anything is evaluated.
"""

import glob
import tempfile
from collections.abc import Callable, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.utils import _get_classes, load_model

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models import experts, fp8
from pomarium.worker.models.checkpoint import Checkpoint, inspect
from pomarium.worker.models.embedding_rows import check_vocabulary
from pomarium.worker.models.forms.completion import check_context
from pomarium.worker.models.forms.mends import mend
from pomarium.worker.models.forms.tensors import CONVERSIONS
from pomarium.worker.models.stage_weights import blank, foreign_parameters
from pomarium.worker.models.stages import StageCut, layers_of, subclass
from pomarium.worker.models.wrappers import WRAPPED_IN, text_tensors

MOST_TOLD = 400
"""Characters of an error that are told: a model may lack hundreds of parameters."""

_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
_QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear, QuantizedMultiLinear)


@dataclass(frozen=True)
class LoadedModel:
    """`config` is config.json as mlx-lm read it; `weight_bytes` counts the own parameters as they lie in memory."""

    model: nn.Module
    config: dict[str, Any]
    weight_bytes: int


@runtime_checkable
class _CastsSelectively(Protocol):
    """mlx-lm models with parameters that keep their own dtype (a router's bias, say)."""

    @property
    def cast_predicate(self) -> Any: ...


@runtime_checkable
class _Sanitises(Protocol):
    """mlx-lm models that rename or change the tensors of a checkpoint."""

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]: ...


Conversion = Callable[[Mapping[str, mx.array]], dict[str, mx.array]]
"""From the tensors of a checkpoint to those that mlx-lm's `sanitize` knows; all lazy."""


def load(
    directory: Path,
    *,
    dense: bool,
    dtype: mx.Dtype | None,
    cut: StageCut | None = None,
    vocab_size: int = 0,
    longest: int | None = None,
) -> LoadedModel:
    """Load and evaluate the model in `directory`, or one stage of it.

    Args:
        dense: replace quantised layers by dense ones in `dtype`.
        dtype: what floating parameters are cast to (scales and biases of quantised layers too); None leaves them.
        cut: the stage's layers; None for the whole model.
        vocab_size: how many tokens requests may name.
        longest: the longest context that is served, in tokens; None for any.

    Raises:
        CheckpointError: missing or damaged files, weights that do not fit the model, another number of layers than
            were cut, or an embedding of fewer than `vocab_size` tokens.
        UnsupportedError: mlx-lm has no such model or quantisation, or the model cannot run in stages.
    """
    checkpoint = inspect(directory)
    check_context(directory, checkpoint.config, longest)
    try:
        _get_classes(dict(checkpoint.config))
    except (ValueError, AttributeError, SystemExit) as error:  # mlx_lm/models/olmo.py exits without its package
        raise UnsupportedError(f"{directory}: mlx-lm has no model type {checkpoint.model_type!r}.") from error
    try:
        model, config = _load_model(
            directory,
            lazy=True,
            strict=True,
            model_config=deepcopy(dict(checkpoint.config)),  # mlx-lm's classes change what they are given
            get_model_classes=_classes_after(_conversions(checkpoint, dtype), checkpoint.config, longest),
        )
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} does not fit mlx-lm's {checkpoint.model_type} model: {type(error).__name__}: {_told(error)}."
        ) from error
    check_vocabulary(model, vocab_size, directory)
    foreign = frozenset[str]() if cut is None else _foreign(model, cut, checkpoint)
    model.update(tree_unflatten([(path, blank(p)) for path, p in tree_flatten(model.parameters()) if path in foreign]))
    if dense:
        dequantise(model, dtype or mx.float32, foreign)
    _cast_and_evaluate(model, dtype, foreign, checkpoint)
    weight_bytes = sum(array.nbytes for path, array in tree_flatten(model.parameters()) if path not in foreign)
    return LoadedModel(model, config, weight_bytes)


def _load_model(directory: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """mlx-lm's `load_model`, which takes the path of a model for a pattern of names: where it would be one, by a link.

    What is loaded lazily stays readable without the link, for MLX keeps its files open.
    """
    if glob.escape(str(directory)) == str(directory):
        model, config = load_model(directory, **options)
        return model, config
    parent = tempfile.gettempdir()
    with tempfile.TemporaryDirectory(dir=parent if glob.escape(parent) == parent else "/tmp") as folder:
        link = Path(folder) / "model"
        link.symlink_to(directory.absolute(), target_is_directory=True)
        model, config = load_model(link, **options)
    return model, config


def _told(error: Exception) -> str:
    """What `error` says as one line, cut: MLX names the parameters that do not fit on lines of their own."""
    text = " ".join(str(error).split()).rstrip(".")
    return text if len(text) <= MOST_TOLD else f"{text[:MOST_TOLD]} ..."


def _conversions(checkpoint: Checkpoint, dtype: mx.Dtype | None) -> tuple[Conversion, ...]:
    """What to do with the tensors of `checkpoint` before mlx-lm's definition sees them, in order."""
    conversions: list[Conversion] = [text_tensors] if WRAPPED_IN in checkpoint.config else []
    if (quantisation := checkpoint.quantisation) is not None and quantisation.blocks is not None:
        blocks, target = fp8.Blocks(*quantisation.blocks), dtype or _DTYPES[checkpoint.dtype]
        conversions.append(lambda weights: fp8.dequantised(weights, blocks, target, str(checkpoint.path)))
    if checkpoint.model_type in experts.MODEL_TYPES:
        conversions.append(experts.stacked)
    if (conversion := CONVERSIONS.get(checkpoint.model_type)) is not None:
        conversions.append(conversion)
    return tuple(conversions)


def _classes_after(
    conversions: tuple[Conversion, ...], facts: Mapping[str, Any], longest: int | None
) -> Callable[[dict[str, Any]], tuple[type[nn.Module], type]]:
    """mlx-lm's choice of classes: the model mended as `facts` (config.json) want it, `sanitize` after `conversions`."""

    def classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
        model_class, args_class = _get_classes(config)

        def build(model: nn.Module, args: Any) -> None:
            model_class.__init__(model, args)
            mend(model, facts, longest)

        if not conversions:
            return subclass(model_class, {"__init__": build}), args_class
        original = model_class.sanitize if issubclass(model_class, _Sanitises) else None

        def sanitize(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            for conversion in conversions:
                weights = conversion(weights)
            return weights if original is None else original(model, weights)

        return subclass(model_class, {"__init__": build, "sanitize": sanitize}), args_class

    return classes


def _foreign(model: nn.Module, cut: StageCut, checkpoint: Checkpoint) -> frozenset[str]:
    if (held := len(layers_of(model))) != cut.num_layers:
        raise CheckpointError(
            f"{checkpoint.path} has {held} layers, but {cut.num_layers} were cut; give all Macs the same model."
        )
    return foreign_parameters(model, cut, checkpoint.model_type)


def dequantise(model: nn.Module, dtype: mx.Dtype, foreign: Set[str] = frozenset()) -> None:
    """Replace each quantised layer in place by its dense kind in `dtype`, one at a time; blanks for `foreign` ones."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _QUANTISED)]
    while layers:
        path, layer = layers.pop()
        model.update_modules(tree_unflatten([(path, _dense(layer, dtype, f"{path}.weight" in foreign))]))


def _dense(layer: Any, dtype: mx.Dtype, foreign: bool) -> nn.Module:
    scales, biases = layer.scales, layer.get("biases")
    if biases is not None:  # affine: else MLX computes in the scales' dtype and float16 rounds a second time
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(
        layer.weight,
        scales,
        biases,
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        global_scale=layer.get("global_scale"),
        dtype=mx.float32,
    ).astype(dtype)
    if foreign:
        weight = blank(weight)
    mx.eval(weight)
    bias = "bias" in layer
    replacement: nn.Module
    # What the constructors draw at random is lazy and never evaluated.
    if isinstance(layer, nn.QuantizedEmbedding):
        replacement = nn.Embedding(*weight.shape)
    elif isinstance(layer, nn.QuantizedLinear):
        replacement = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    elif isinstance(layer, QuantizedSwitchLinear):
        replacement = SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0], bias=bias)
    else:
        replacement = MultiLinear(weight.shape[2], weight.shape[1], weight.shape[0])
    replacement.weight = weight
    if bias:
        replacement.bias = layer.bias
    return replacement.eval()


def _cast_and_evaluate(model: nn.Module, dtype: mx.Dtype | None, foreign: Set[str], checkpoint: Checkpoint) -> None:
    scaled = checkpoint.quantisation is not None and checkpoint.quantisation.blocks is not None
    castable = model.cast_predicate if isinstance(model, _CastsSelectively) and dtype != mx.float32 else None
    paths = [path for path, _ in tree_flatten(model.parameters())]  # names alone: arrays would stay alive, as stored
    for path in paths:
        owner: Any = model
        *parents, name = path.split(".")
        for parent in parents:
            owner = owner[int(parent)] if isinstance(owner, list | tuple) else owner[parent]
        parameter = owner[name]
        floating = mx.issubdtype(parameter.dtype, mx.floating)
        if dtype is not None and floating and (castable is None or castable(path)):
            parameter = parameter.astype(dtype)
            if path in foreign:
                parameter = blank(parameter)
            owner[name] = parameter
        mx.eval(parameter)
        if scaled and floating and path not in foreign and not mx.isfinite(parameter).all().item():
            raise CheckpointError(
                f"{checkpoint.path}: {path} holds values that are not finite, so its FP8 scales are damaged; "
                "download the checkpoint again."
            )
