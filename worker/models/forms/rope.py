"""transformers' `rope_parameters` -> the keys in which mlx-lm's definitions read positions; one normal form of scaling.

    {"rope_theta": b, "rope_type": t, "partial_rotary_factor": f, ...}     -> theta, scaling, fraction
    {"full_attention": {...}, "sliding_attention": {...}}                   -> the same, and the sliding layers' theta

Sources: transformers/modeling_rope_utils.py (5.19: what each rope type reads and assumes), mlx_lm/models/rope_utils.py.
`partial_rotary_factor` beside `rope_parameters` is often a left-over of a default, and transformers goes by the latter.
A scaling in the older place, `rope_scaling`, goes through the same normal form, since mlx-lm assumes other values than
transformers where a key is absent.
"""

import math
from collections.abc import Mapping
from typing import Any

from pomarium.worker.models.forms.family import Config, Places, Rope

FULL, SLIDING = "full_attention", "sliding_attention"
_BASE = ("rope_theta", "partial_rotary_factor")
_ORIGINAL = "original_max_position_embeddings"
_KNOWN = frozenset({
    "rope_theta", "partial_rotary_factor", "rope_type", "type", "factor", _ORIGINAL, "attention_factor", "truncate",
    "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "short_factor", "long_factor", "short_mscale", "long_mscale",
    "low_freq_factor", "high_freq_factor", "alpha", "finetuned", "mrope_section", "mrope_interleaved",
    "llama_4_scaling_beta", "max_position_embeddings",
})  # fmt: skip
"""Keys that some rope type has. Those of another type than a config's own have no effect in transformers either."""


def older_keys(config: Config, rope: Rope) -> dict[str, Any]:
    """The keys that mlx-lm reads, of a config that has `rope_parameters`, and its `rope_scaling` in normal form.

    Raises:
        ValueError: a clause that names the key that mlx-lm's definition has no form for, or that contradicts another.
    """
    found = _from_parameters(config, rope)
    scaling_key = rope.scaling or "rope_scaling"
    old = config.get(scaling_key)
    if isinstance(old, Mapping) and rope.places is not Places.NONE:
        if rope.places is Places.FLAT and scaling_key in found and not _agree(old, found[scaling_key]):
            raise ValueError(f"{scaling_key} and rope_parameters contradict each other; remove one of them")
        found[scaling_key] = normal_scaling(old, config, rope, scaling_key)
    for key, value in found.items():
        if (
            key not in (scaling_key, rope.fraction)
            and key in config
            and config[key] is not None
            and not _same(config[key], value)
        ):
            raise ValueError(f"{key} is {config[key]!r} and rope_parameters says {value!r}; remove one of them")
    if rope.unscaled is not None and found.get(scaling_key, old) is None:
        found[scaling_key] = rope.unscaled(config)
    return found


def _from_parameters(config: Config, rope: Rope) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if parameters is None or parameters == {}:
        return {}
    if not isinstance(parameters, Mapping):
        raise ValueError("rope_parameters is not a JSON object")
    if rope.places is Places.NONE:
        return {}
    if rope.places is Places.AS_IT_IS:
        for part in _parts(parameters).values():
            _check(part, rope, "rope_parameters")
        return {}
    full, sliding = _full_and_sliding(parameters, rope)
    found: dict[str, Any] = {}
    if "rope_theta" in full and rope.theta is not None:
        found[rope.theta] = full["rope_theta"]
    if sliding is not None and rope.sliding_theta is not None:
        if _type(sliding) != "default" or sliding.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("rope_parameters of sliding_attention scales or rotates a part of a head")
        found[rope.sliding_theta] = sliding["rope_theta"]
    found |= _fraction(full, rope)
    scaling = normal_scaling({k: v for k, v in full.items() if k not in _BASE}, config, rope, "rope_parameters")
    if rope.scaling is not None:
        found[rope.scaling] = scaling
    return found


def _fraction(full: Mapping[str, Any], rope: Rope) -> dict[str, Any]:
    fraction = full.get("partial_rotary_factor")
    if fraction is None:
        return {}
    if rope.fraction is not None:
        return {rope.fraction: fraction}
    if fraction != rope.whole:
        raise ValueError(f"rope_parameters has partial_rotary_factor {fraction}, not {rope.whole}")
    return {}


def _parts(parameters: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Layer type -> its parameters; one entry "" of a flat object. Layers without positions have null."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, Mapping)}
    return nested or {"": parameters}


def _full_and_sliding(parameters: Mapping[str, Any], rope: Rope) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
    parts = _parts(parameters)
    if "" in parts:
        return parts[""], parts[""] if rope.sliding_theta is not None else None
    if unknown := parts.keys() - {FULL, SLIDING}:
        raise ValueError(f"rope_parameters has an entry for {min(unknown)}")
    full, sliding = parts.get(FULL, parts.get(SLIDING, {})), parts.get(SLIDING)
    if rope.sliding_theta is None and sliding is not None and dict(sliding) != dict(full):
        raise ValueError("rope_parameters rotates sliding_attention layers otherwise than full_attention ones")
    return full, sliding


def normal_scaling(scaling: Mapping[str, Any], config: Config, rope: Rope, where: str) -> dict[str, Any] | None:
    """`scaling` with the values that transformers assumes for absent keys; None if it scales nothing.

    Raises:
        ValueError: a clause naming what mlx-lm's definition does not compute.
    """
    kind = _check(scaling, rope, where)
    if kind == "default":
        return None
    normal = {**scaling, "rope_type": kind, "type": kind} if where == "rope_parameters" else dict(scaling)
    if kind in ("yarn", "llama3", "longrope") and normal.get(_ORIGINAL) is None:
        normal[_ORIGINAL] = config.get(_ORIGINAL) or config.get("max_position_embeddings")
    return _normal_yarn(normal, config) if kind == "yarn" else normal


def _check(scaling: Mapping[str, Any], rope: Rope, where: str) -> str:
    kind = _type(scaling)
    if kind not in rope.types:
        raise ValueError(f"{where} has rope_type {kind!r}")
    if unknown := [key for key, value in scaling.items() if key not in _KNOWN and value is not None]:
        raise ValueError(f"{where} has {unknown[0]!r}")
    return kind


def _normal_yarn(scaling: dict[str, Any], config: Config) -> dict[str, Any]:
    """mlx-lm multiplies by m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1, where 1 and 0 are assumed.

    transformers multiplies by `attention_factor` if it is given, by that quotient if it has both, else by m(1).
    """
    scaling = {key: value for key, value in scaling.items() if value is not None}
    wanted = scaling.pop("attention_factor", None)
    if "factor" not in scaling:
        scaling["factor"] = config["max_position_embeddings"] / scaling[_ORIGINAL]
    logarithm = 0.1 * math.log(scaling["factor"]) if scaling["factor"] > 1 else 0.0
    if wanted is None and not (scaling.get("mscale") and scaling.get("mscale_all_dim")):
        scaling.pop("mscale", None)
        wanted = logarithm + 1 if scaling.get("mscale_all_dim") else None
    if wanted is not None and logarithm > 0:
        below = scaling.get("mscale_all_dim", 0) * logarithm + 1
        scaling["mscale"] = (wanted * below - 1) / logarithm
    elif wanted not in (None, 1.0):
        raise ValueError(f"its rope scaling has attention_factor {wanted} and no factor above 1")
    return scaling


def _type(scaling: Mapping[str, Any]) -> str:
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    return {"su": "longrope", "deepseek_yarn": "yarn"}.get(kind, kind)


def _agree(old: Mapping[str, Any], new: Mapping[str, Any] | None) -> bool:
    if new is None:
        return _type(old) in ("default", "mrope")
    return _type(old) == _type(new) and all(_same(old[key], new[key]) for key in old.keys() & new.keys() - {"type"})


def _same(one: Any, other: Any) -> bool:
    return bool(one == other)
