"""config.json in the form that mlx-lm's definitions read, whoever wrote it; what has no such form is refused by name.

    config.json as read --completed--> with keys that transformers 5 moved, renamed or dropped (families.py, rope.py)
                                       '- wrappers: text_config (wrapped.py)

What a file says in mlx-lm's form is left as it is; where it says something else in transformers' form too, that is an
error. What nobody reads and changes the mathematics is one as well (unread.py).
"""

import inspect
from collections.abc import Mapping, Set
from functools import cache
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.forms.families import FAMILIES
from pomarium.worker.models.forms.family import Config, Family
from pomarium.worker.models.forms.rope import older_keys
from pomarium.worker.models.forms.unread import definition_of, table, unread_key
from pomarium.worker.models.forms.wrapped import completed_wrapper

_FLOAT = "__float__"  # transformers/configuration_utils.py
_CURE = "mlx-lm's definition computes something else; use a checkpoint without it"


SPARSE_TO = 2048
"""`index_topk` of a config without one, in both libraries."""

_MODEL_TYPES = MappingProxyType({"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"})
"""transformers' model type of a text model by itself -> mlx-lm's."""


def completed(directory: Path, config: Config) -> dict[str, Any]:
    """`config` in mlx-lm's form; unchanged for model types that transformers does not know.

    Raises:
        UnsupportedError: names the key that mlx-lm's definition has no form for, or that contradicts another one.
    """
    config = _decoded(config)
    text, outer = config.get("text_config"), str(config.get("model_type"))
    if isinstance(text, dict):
        inner = outer if outer in table() else str(text.get("model_type", outer))
        config = {**config, "text_config": _completed(directory, text, inner)}
    else:
        outer = _MODEL_TYPES.get(outer, outer)
        config = _completed(directory, {**config, "model_type": outer} if "model_type" in config else config, outer)
    return completed_wrapper(directory, config)


def check_context(directory: Path, config: Config, longest: int | None) -> None:
    """Raises UnsupportedError if `longest` tokens (None: any number) are more than mlx-lm's definition computes as
    transformers' does: its sparse attention picks other tokens once there are more than it may pick."""
    model_type = str(config.get("model_type"))
    key = FAMILIES.get(model_type, Family()).exact_to
    if key is None:
        return
    limit = int(config.get(key) or SPARSE_TO)
    if longest is None or longest > limit:
        raise UnsupportedError(
            f"{directory}: beyond {limit} tokens ({key}) mlx-lm's definition of {model_type} attends to other tokens "
            f"than transformers'; set --max-model-len {limit} or less."
        )


def _decoded(value: Any) -> Any:
    """`value` with the numbers that JSON has no way to write, which transformers 5 puts in objects."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT}:
            return float(value[_FLOAT])
        return {key: _decoded(entry) for key, entry in value.items()}
    return [_decoded(entry) for entry in value] if isinstance(value, list) else value


def _completed(directory: Path, config: Config, model_type: str) -> dict[str, Any]:
    if model_type not in FAMILIES and model_type not in table():
        return dict(config)
    family = FAMILIES.get(model_type, Family())
    if family.refused is not None:
        raise UnsupportedError(f"{directory}: {model_type} is not served: {family.refused}; use another model.")
    try:
        found = _found(config, model_type, family)
    except (ValueError, KeyError, TypeError) as error:
        raise UnsupportedError(f"{directory}: as a {model_type} model, {_clause(error)}; {_CURE}.") from error
    full = {**config, **found}
    if (key := unread_key(full, model_type, family, _arguments(model_type))) is not None:
        raise UnsupportedError(
            f"{directory}: its config.json has {key!r}: {full[key]!r}, which mlx-lm's definition of {model_type} does "
            "not compute; use a checkpoint without it."
        )
    return full


def _clause(error: Exception) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def _found(config: Config, model_type: str, family: Family) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, older in family.renamed.items():
        if key not in config:
            continue
        if older in config and config[older] != config[key]:
            raise ValueError(f"{key} is {config[key]!r} and {older} is {config[older]!r}; remove one of them")
        found[older] = config[key]
    if _written_by_transformers_5(config):
        found |= {key: value for key, value in family.implied.items() if key not in config}
    found |= older_keys(config, family.rope)
    found |= {} if family.derive is None else family.derive(config)
    return found


def _written_by_transformers_5(config: Config) -> bool:
    return "rope_parameters" in config or str(config.get("transformers_version", "")).startswith("5.")


@cache
def _arguments(model_type: str) -> Set[str]:
    module = definition_of(model_type)
    if module is None:
        return frozenset()
    try:
        definition = import_module(f"mlx_lm.models.{module}")
    except SystemExit:  # mlx_lm/models/olmo.py, where a package of its own is not installed; `load` refuses it
        return frozenset()
    return frozenset(inspect.signature(definition.ModelArgs).parameters)
