"""Facts of config.json in the form in which mlx-lm's definitions read them, where releases write another one.

    config.json as read --completed--> with what mlx-lm would else replace by a default of its own

transformers 5.15 and later save Gemma 4's head sizes per layer, and Qwen3.5's kinds of layer as a list; mlx-lm 0.32
reads one size for all full layers (mlx_lm/models/gemma4_text.py) and every how many layers one attends (qwen3_5.py).
Its Gemma 4 wrapper takes the vocabulary's size from outside of `text_config`, where transformers writes none. What a
file already says in mlx-lm's form is left as it is.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.forms.families import FULL, full_interval
from pomarium.worker.models.forms.family import Config


def completed_wrapper(directory: Path, config: Config) -> dict[str, Any]:
    """`config`, completed; unchanged for most model types.

    Raises:
        UnsupportedError: layers differ in a way that mlx-lm's definition has no form for.
    """
    completion = _COMPLETIONS.get(str(config.get("model_type")))
    if completion is None:
        return dict(config)
    text = config.get("text_config")
    if not isinstance(text, dict):
        return dict(config) if "text_config" in config else {**completion(directory, config), **config}
    found = {**completion(directory, text), **text}
    outside = {"vocab_size": text["vocab_size"]} if config["model_type"] == "gemma4" and "vocab_size" in text else {}
    return {**outside, **config, "text_config": found}


def _gemma4(directory: Path, text: Config) -> dict[str, Any]:
    layers, kinds = text.get("per_layer_config"), text.get("layer_types")
    if not isinstance(layers, dict) or not isinstance(kinds, list):
        return {}
    changed = {str(index): dict(entry) for index, entry in layers.items() if entry}
    full = {str(index) for index, kind in enumerate(kinds) if kind == FULL}
    if not changed:
        return {"global_head_dim": text.get("head_dim")}
    first = next(iter(changed.values()))
    alike = changed.keys() == full and all(entry == first for entry in changed.values())
    if not alike or not first.keys() <= {"head_dim", "num_key_value_heads"}:
        raise UnsupportedError(
            f"{directory}: its per_layer_config says more than sizes of heads that all full-attention layers share, "
            "which mlx-lm has no form for; use a released Gemma 4 checkpoint."
        )
    sizes = {"global_head_dim": first.get("head_dim", text.get("head_dim"))}
    heads = first.get("num_key_value_heads")
    return sizes if heads is None else {**sizes, "num_global_key_value_heads": heads}


def _qwen3_5(directory: Path, text: Config) -> dict[str, Any]:
    kinds = text.get("layer_types")
    if not isinstance(kinds, list) or "full_attention_interval" in text or FULL not in kinds:
        return {}
    try:
        return {"full_attention_interval": full_interval(kinds)}
    except ValueError as error:
        raise UnsupportedError(
            f"{directory}: its {error}, which mlx-lm has no form for; use a released Qwen3.5 checkpoint."
        ) from None


_COMPLETIONS: Mapping[str, Callable[[Path, Config], dict[str, Any]]] = {
    "gemma4": _gemma4,
    "gemma4_text": _gemma4,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
}
