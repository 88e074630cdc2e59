"""The families that transformers 5.19 and mlx-lm 0.32 share, as data: what the one writes and the other reads.

A family that is not listed has its rope in the usual keys and nothing else moved. Sources: transformers/models/*/
configuration_*.py and modeling_*.py, mlx_lm/models/*.py. tests/parity/test_transformers.py holds each entry against
transformers' forward.
"""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from pomarium.worker.models.forms.family import SCALED, Config, Family, Places, Rope, plain_rope

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_MAMBA_NAMES = MappingProxyType({LINEAR: "mamba", FULL: "attention"})
_FRACTION = "partial_rotary_factor"
_GELU = ("gelu_pytorch_tanh", "gelu")  # Gemma's older files say gelu, and always meant its approximation
_CAUSAL_TEXT = {"use_bidirectional_attention": (False, "vision")}
_MLA_TYPES = frozenset({"default", "yarn"})
_LINEAR = frozenset({"default", "linear"})


def _layer_types(config: Config) -> list[str] | None:
    kinds = config.get("layer_types")
    return [str(kind) for kind in kinds] if isinstance(kinds, list) else None


def full_interval(kinds: Sequence[Any]) -> int:
    """Every how many layers one attends fully, of a list of layer types; one more than there are if none does.

    Raises:
        ValueError: a clause, if the distances differ.
    """
    interval = kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1
    if any((kind == FULL) != (number % interval == 0) for number, kind in enumerate(kinds, start=1)):
        raise ValueError("layer_types puts full attention at irregular distances")
    return interval


def _sliding_pattern(config: Config) -> Mapping[str, Any]:
    kinds = _layer_types(config)
    return {} if kinds is None else {"sliding_window_pattern": full_interval(kinds)}


def _exaone4(config: Config) -> Mapping[str, Any]:
    kinds = _layer_types(config)
    if kinds is None or isinstance(config.get("sliding_window_pattern"), str):
        return {}
    if SLIDING not in kinds:
        return {"sliding_window_pattern": None}
    return {"sliding_window_pattern": "".join("G" if kind == FULL else "L" for kind in kinds)}


def _moe_layers(config: Config) -> Mapping[str, Any]:
    kinds = config.get("mlp_layer_types")
    return {"is_moe_layer": [kind == "sparse" for kind in kinds]} if isinstance(kinds, list) else {}


def _dense_first(config: Config) -> Mapping[str, Any]:
    """How many layers are dense before the first with experts, of a list."""
    kinds = config.get("mlp_layer_types")
    if not isinstance(kinds, list):
        return {}
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if "dense" in kinds[dense:]:
        raise ValueError("mlp_layer_types has a dense layer after one with experts")
    return {"first_k_dense_replace": dense}


def _all_sparse(config: Config) -> Mapping[str, Any]:
    if set(config.get("mlp_layer_types") or ["sparse"]) != {"sparse"}:
        raise ValueError("mlp_layer_types has a dense layer")
    return {}


def _glm_moe_dsa(config: Config) -> Mapping[str, Any]:
    if set(config.get("indexer_types") or ["full"]) != {"full"}:
        raise ValueError("indexer_types has layers that share an indexer")
    return _dense_first(config)


def _mamba_names(config: Config) -> Mapping[str, Any]:
    kinds = _layer_types(config)
    return {} if kinds is None else {"layer_types": [_MAMBA_NAMES.get(kind, kind) for kind in kinds]}


def _nemotron_h(config: Config) -> Mapping[str, Any]:
    kinds = config.get("layers_block_type")
    if not isinstance(kinds, list) or "hybrid_override_pattern" in config:
        return {}
    limit = {"time_step_limit": [config["time_step_min"], math.inf]} if "time_step_min" in config else {}
    return {"layers_block_type": [_MAMBA_NAMES.get(kind, kind) for kind in kinds], **limit}


def _lfm2(config: Config) -> Mapping[str, Any]:
    return {"block_dim": config["hidden_size"]} if "hidden_size" in config else {}


def _minimax(config: Config) -> Mapping[str, Any]:
    rope, head = config.get("rope_parameters"), config.get("head_dim")
    if not isinstance(rope, Mapping) or not isinstance(head, int):
        return {}
    return {"rotary_dim": int(head * rope.get(_FRACTION, 1.0))}


def _gpt_bigcode(config: Config) -> Mapping[str, Any]:
    return {} if config.get("n_inner") is not None else {"n_inner": 4 * config["n_embd"]}


def _dbrx(config: Config) -> Mapping[str, Any]:
    rope, attention = config.get("rope_parameters"), config.get("attn_config")
    if not isinstance(rope, Mapping) or not isinstance(attention, Mapping):
        return {}
    if attention.get("rope_theta", rope["rope_theta"]) != rope["rope_theta"]:
        raise ValueError("attn_config and rope_parameters name different values of rope_theta")
    return {"attn_config": {**attention, "rope_theta": rope["rope_theta"]}}


def _falcon_h1(config: Config) -> Mapping[str, Any]:
    if config.get("mamba_rms_norm") and config.get("mamba_n_groups", 1) != 1:
        raise ValueError("mamba_rms_norm is taken per group of mamba_n_groups")
    return {}


def _llama4_text(config: Config) -> Mapping[str, Any]:
    chunk, longest = config.get("attention_chunk_size"), config.get("max_position_embeddings")
    if isinstance(chunk, int) and isinstance(longest, int) and chunk < longest:
        raise ValueError(f"attention_chunk_size is {chunk}")
    return {}


def _full_interval(config: Config) -> Mapping[str, Any]:
    kinds = _layer_types(config)
    if kinds is None or FULL not in kinds or config.get("full_attention_interval") is not None:
        return {}
    return {"full_attention_interval": full_interval(kinds)}


def _yarn_of_one(config: Config) -> dict[str, Any]:
    return {"type": "yarn", "rope_type": "yarn", "factor": 1.0}


def _longrope_of_one(config: Config) -> dict[str, Any]:
    ones = [1.0] * (int(config["qk_rope_head_dim"]) // 2)
    length = config["max_position_embeddings"]
    return {
        "type": "longrope",
        "rope_type": "longrope",
        "short_factor": ones,
        "long_factor": ones,
        "original_max_position_embeddings": length,
    }


_SCALED_MLA = Rope(types=_MLA_TYPES)
_MLP_TYPES = frozenset({"mlp_layer_types", "first_k_dense_replace"})

FAMILIES: Mapping[str, Family] = MappingProxyType({
    "afmoe": Family(handled=frozenset({"global_attn_every_n_layers"})),
    "apertus": Family(implied={"mlp_bias": False, "post_norm": False, "qk_norm": True}),
    "bitnet": Family(),
    "cohere": Family(plain_rope()),
    "cohere2": Family(plain_rope(), derive=_sliding_pattern),
    "dbrx": Family(Rope(theta=None, scaling=None, types=frozenset({"default"})), derive=_dbrx),
    "deepseek_v2": Family(
        Rope(types=_MLA_TYPES, unscaled=_yarn_of_one), computed={"norm_topk_prob": (False,)}
    ),
    "deepseek_v3": Family(_SCALED_MLA),
    "deepseek_v32": Family(_SCALED_MLA, derive=_dense_first, handled=_MLP_TYPES, exact_to="index_topk"),
    "dots1": Family(windowed=True),
    "ernie4_5": Family(plain_rope()),
    "ernie4_5_moe": Family(plain_rope()),
    "exaone4": Family(derive=_exaone4),
    "exaone_moe": Family(derive=_moe_layers, handled=_MLP_TYPES),
    "falcon_h1": Family(computed={"attention_in_multiplier": (1.0,)}, derive=_falcon_h1),
    "falcon_mamba": Family(Rope(Places.NONE)),
    "gemma": Family(plain_rope(), computed={"hidden_act": _GELU}),
    "gemma2": Family(plain_rope(), windowed=True),
    "gemma3_text": Family(
        Rope(sliding_theta="rope_local_base_freq"), derive=_sliding_pattern, computed=_CAUSAL_TEXT
    ),
    "gemma4_text": Family(Rope(Places.AS_IT_IS), computed=_CAUSAL_TEXT),
    "glm": Family(plain_rope(fraction=_FRACTION)),
    "glm4": Family(plain_rope(fraction=_FRACTION)),
    "glm4_moe": Family(plain_rope(fraction=_FRACTION)),
    "glm4_moe_lite": Family(_SCALED_MLA, derive=_dense_first, handled=_MLP_TYPES),
    "glm_moe_dsa": Family(
        Rope(Places.AS_IT_IS),
        derive=_glm_moe_dsa,
        handled=_MLP_TYPES | {"indexer_types"},
        implied={"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
        exact_to="index_topk",
    ),
    "gpt2": Family(Rope(Places.NONE), renamed={"n_positions": "n_ctx"}),
    "gpt_bigcode": Family(Rope(Places.NONE), derive=_gpt_bigcode),
    "gpt_neox": Family(
        plain_rope(theta="rotary_emb_base", fraction="rotary_pct"),
        computed={"hidden_act": (*_GELU, "gelu_fast", "gelu_new")},
    ),
    "gptj": Family(Rope(Places.NONE)),
    "granitemoehybrid": Family(plain_rope(), derive=_mamba_names),
    "helium": Family(plain_rope()),
    "hunyuan_v1_dense": Family(Rope(types=frozenset({"default", "dynamic"}))),
    "jamba": Family(Rope(Places.NONE)),
    "laguna": Family(Rope(Places.AS_IT_IS)),
    "lfm2": Family(plain_rope(), derive=_lfm2),
    "lfm2_moe": Family(plain_rope()),
    "llama4_text": Family(
        plain_rope(),
        computed={"attn_temperature_tuning": (False,), "num_local_experts": (0,), "interleave_moe_layer_step": (0,)},
        derive=_llama4_text,
        handled=frozenset({"attention_chunk_size", "attn_scale", "floor_scale", "no_rope_layer_interval", "moe_layers"})
        | {"num_experts_per_tok"},
    ),
    "mamba": Family(Rope(Places.NONE)),
    "mamba2": Family(Rope(Places.NONE)),
    "mellum": Family(
        Rope(Places.AS_IT_IS, types=SCALED - {"linear"}), renamed={"num_local_experts": "num_experts"},
        derive=_all_sparse, handled=_MLP_TYPES,
    ),
    "minicpm3": Family(Rope(types=frozenset({"default", "longrope"}), unscaled=_longrope_of_one)),
    "minimax": Family(plain_rope(fraction=_FRACTION), derive=_minimax, implied={"shared_intermediate_size": 0}),
    "minimax_m2": Family(plain_rope(fraction=_FRACTION), derive=_minimax, implied={"shared_intermediate_size": 0}),
    "ministral3": Family(Rope(Places.AS_IT_IS)),
    "mistral": Family(windowed=True),
    "mixtral": Family(plain_rope(), windowed=True),
    "nanochat": Family(plain_rope()),
    "nemotron": Family(Rope(fraction=_FRACTION, types=_LINEAR)),
    "nemotron_h": Family(Rope(Places.NONE), derive=_nemotron_h),
    "olmo_hybrid": Family(plain_rope()),
    "phi": Family(plain_rope(fraction=_FRACTION)),
    "phi3": Family(Rope(fraction=_FRACTION, types=frozenset({"default", "linear", "longrope"})), windowed=True),
    "phimoe": Family(
        Rope(types=frozenset({"default", "longrope"})),
        computed={"attention_bias": (True,), "lm_head_bias": (True,)},
        windowed=True,
    ),
    "qwen2": Family(windowed=True),
    "qwen2_moe": Family(plain_rope(types=_LINEAR), windowed=True),
    "qwen3": Family(windowed=True),
    "qwen3_moe": Family(plain_rope(), renamed={"num_local_experts": "num_experts"}, windowed=True),
    "qwen3_next": Family(Rope(fraction=_FRACTION), derive=_full_interval),
    "qwen3_5": Family(Rope(Places.AS_IT_IS)),
    "qwen3_5_moe": Family(Rope(Places.AS_IT_IS)),
    "recurrent_gemma": Family(refused="mlx-lm's recurrent layers give other results than transformers'"),
    "solar_open": Family(
        Rope(fraction=_FRACTION), implied={_FRACTION: 1.0, "first_k_dense_replace": 0, "intermediate_size": 0}
    ),
    "stablelm": Family(plain_rope(fraction=_FRACTION)),
    "starcoder2": Family(plain_rope(), windowed=True),
})  # fmt: skip
