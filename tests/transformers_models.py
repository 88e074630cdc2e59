"""Tiny models of all families that transformers and mlx-lm share, as transformers saves them, and the table of them.

    CASES[name] --save--> a folder by transformers' own save_pretrained, and transformers' logits in float32
    CASES       --table--> the table in docs/testing.md        python tests/transformers_models.py     rewrites it

What matters is set away from every default: bases of RoPE, scaling, windows shorter than the text, soft caps,
multipliers, parts of heads. Noise on all weights makes sure that none can be left out unnoticed.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Config = dict[str, Any]

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
VOCAB_SIZE, WINDOW, LENGTH = 128, 16, 80
DOC = Path(__file__).parents[1] / "docs" / "testing.md"
BEGIN, END = "<!-- families against transformers: begin -->", "<!-- families against transformers: end -->"


@dataclass(frozen=True)
class Case:
    """A tiny model.

    Attributes:
        model_type: transformers'. config: what differs from _COMMON.
        refused: what its refusal says (a regular expression); None where the logits are to be right.
        always: runs without the marker `full`.
        longest: tokens of context to load it for; None for any.
    """

    model_type: str
    config: Config
    refused: str | None = None
    always: bool = False
    longest: int | None = None


_COMMON: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_THETA, _ORIGINAL = 70000.0, 32


def _rope(**changes: Any) -> Config:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": _THETA, **changes}}


_SCALINGS: dict[str, Config] = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": _ORIGINAL},
    "yarn_factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.3,
    },
    "yarn_exact": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": _ORIGINAL,
        "truncate": False,
    },
}
_ROPE = _rope()
_HALF = _rope(partial_rotary_factor=0.5)
_LONGROPE = _rope(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 1.5, 2.0, 4.0],
    original_max_position_embeddings=_ORIGINAL,
)
_HEAD: Config = {"head_dim": 8}
_TIED: Config = {"tie_word_embeddings": True}
_WIDE: Config = {"hidden_size": 64}  # Gemma scales by the root of it, which mlx-lm rounds to bfloat16: 8 stays 8
_EXPERTS: Config = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SHARED: Config = {"shared_expert_intermediate_size": 24}
_ROUTED: Config = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "n_group": 2,
    "topk_group": 1,
}
_MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_MIXED: Config = {"num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2, "sliding_window": WINDOW}
_SWITCHED: Config = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
_NESTED: Config = {
    "rope_parameters": {
        FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": _THETA},
        SLIDING: {"rope_type": "default", "rope_theta": 3000.0},
    }
}
_PLAIN_NESTED: Config = {
    "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": _THETA},
        SLIDING: {"rope_type": "default", "rope_theta": 3000.0},
    }
}
_GRANITE: Config = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.35,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
}
_CAPPED: Config = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_DELTA: Config = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": [LINEAR, FULL] * 2,
}
_MAMBA: Config = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
_INDEXED: Config = {"index_head_dim": 8, "index_n_heads": 8, "index_topk": 96, "head_dim": 4}
_GPT: Config = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
_SINKS: Config = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "layer_types": [SLIDING, FULL] * 2,
}

_BASES: dict[str, tuple[str, Config]] = {
    # name: (model_type, what differs from _COMMON); each also with the scalings of _SCALED
    "afmoe": (
        "afmoe",
        {**_ROPE, **_HEAD, **_EXPERTS, "sliding_window": WINDOW, "num_dense_layers": 1, "num_shared_experts": 1}
        | {"route_scale": 1.5, "mup_enabled": True},
    ),
    "apertus": ("apertus", _ROPE),
    "cohere": ("cohere", {**_ROPE, **_TIED, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("cohere2", {**_MIXED, **_ROPE, **_HEAD, **_TIED, "logit_scale": 0.5}),
    "dots1": ("dots1", {**_ROPE, **_ROUTED, **_HEAD}),
    "ernie4_5": ("ernie4_5", {**_ROPE, **_HEAD}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**_ROPE, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1, "moe_layer_end_index": 3, "moe_layer_interval": 1},
    ),
    "exaone4": ("exaone4", {**_MIXED, **_ROPE, **_HEAD}),
    "exaone_moe": (
        "exaone_moe",
        {**_MIXED, **_ROPE, **_HEAD, **_EXPERTS, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
        | {"first_k_dense_replace": 1, "routed_scaling_factor": 1.5},
    ),
    "falcon_h1": (
        "falcon_h1",
        {**_ROPE, **_HEAD, **_MAMBA, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_n_groups": 1}
        | {"embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7}
        | {"attention_out_multiplier": 0.9, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8}
        | {"mlp_multipliers": [0.9, 1.1], "ssm_multipliers": [1.1, 0.9, 1.2, 0.8, 1.05]},
    ),
    "gemma": ("gemma", {**_ROPE, **_HEAD, **_TIED}),
    "gemma2": ("gemma2", {**_ROPE, **_HEAD, **_TIED, **_CAPPED, "sliding_window": WINDOW}),
    "glm": ("glm", {**_HALF, **_HEAD, "attention_bias": True}),
    "glm4": ("glm4", {**_HALF, **_HEAD, "attention_bias": True}),
    "glm4_moe": ("glm4_moe", {**_HALF, **_ROUTED, **_HEAD}),
    "gpt_neox": ("gpt_neox", {**_HALF, "intermediate_size": 128, "use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", {**_ROPE, **_HEAD, **_SINKS}),
    "granite": ("granite", {**_ROPE, **_GRANITE}),
    "granitemoe": ("granitemoe", {**_ROPE, **_GRANITE, **_EXPERTS}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {**_ROPE, **_GRANITE, **_MAMBA, "num_local_experts": 4, "num_experts_per_tok": 2}
        | {"shared_intermediate_size": 16, "layer_types": [LINEAR, FULL] * 2, "position_embedding_type": "rope"},
    ),
    "helium": ("helium", {**_ROPE, **_HEAD}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**_ROPE, **_HEAD}),
    "lfm2": ("lfm2", {**_ROPE, **_TIED, "layer_types": ["conv", FULL] * 2, "conv_L_cache": 3}),
    "lfm2_moe": (
        "lfm2_moe",
        {**_ROPE, **_TIED, **_EXPERTS, "layer_types": ["conv", FULL] * 2, "conv_L_cache": 3, "num_dense_layers": 1},
    ),
    "llama": ("llama", {**_ROPE, **_HEAD, "attention_bias": True, "mlp_bias": True}),
    "minimax_m2": ("minimax_m2", {**_HALF, **_EXPERTS, **_HEAD}),
    "mistral": ("mistral", {**_ROPE, "sliding_window": None}),
    "mixtral": ("mixtral", {**_ROPE, **_EXPERTS, **_HEAD, "sliding_window": None}),
    "nemotron": ("nemotron", _rope(partial_rotary_factor=0.25)),
    "olmo2": ("olmo2", _ROPE),
    "olmo3": ("olmo3", {**_MIXED, **_ROPE}),
    "olmoe": ("olmoe", {**_ROPE, **_EXPERTS, "norm_topk_prob": True}),
    "phi": ("phi", {**_HALF, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", _ROPE),
    "qwen2_moe": ("qwen2_moe", {**_ROPE, **_EXPERTS, **_SHARED, "decoder_sparse_step": 1, "mlp_only_layers": []}),
    "qwen3": ("qwen3", {**_ROPE, **_HEAD}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_ROPE, **_EXPERTS, **_HEAD, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    ),
    "qwen3_next": ("qwen3_next", {**_HALF, **_EXPERTS, **_HEAD, **_DELTA, "shared_expert_intermediate_size": 16}),
    "seed_oss": ("seed_oss", {**_ROPE, **_HEAD}),
    "smollm3": ("smollm3", {**_ROPE, "no_rope_layers": [1, 1, 0, 1]}),
    "stablelm": ("stablelm", {**_HALF, "use_qkv_bias": True}),
    "starcoder2": ("starcoder2", {**_ROPE, "sliding_window": None, "norm_epsilon": 1e-3}),
}

_OTHERS: dict[str, tuple[str, Config]] = {
    "llama_tied": ("llama", {**_ROPE, **_TIED}),
    "llama_dynamic": ("llama", _rope(rope_type="dynamic", factor=3.0)),
    "mistral_window": ("mistral", {**_ROPE, **_HEAD, "sliding_window": WINDOW}),
    "mixtral_window": ("mixtral", {**_ROPE, **_EXPERTS, "sliding_window": WINDOW}),
    "starcoder2_window": ("starcoder2", {**_ROPE, "sliding_window": WINDOW}),
    "qwen2_window": ("qwen2", {**_ROPE, **_SWITCHED}),
    "qwen3_window": ("qwen3", {**_ROPE, **_HEAD, **_SWITCHED}),
    "qwen3_moe_plain": ("qwen3_moe", {**_ROPE, **_EXPERTS, **_HEAD, "norm_topk_prob": False, "decoder_sparse_step": 2}),
    "qwen2_moe_normed": ("qwen2_moe", {**_ROPE, **_EXPERTS, **_SHARED, "norm_topk_prob": True}),
    "qwen2_moe_step": ("qwen2_moe", {**_ROPE, **_EXPERTS, **_SHARED, "decoder_sparse_step": 2}),
    "olmoe_clip": ("olmoe", {**_ROPE, **_EXPERTS, "clip_qkv": 0.5}),
    "gemma3_text": ("gemma3_text", {**_WIDE, **_HEAD, **_TIED, **_MIXED, **_NESTED, "query_pre_attn_scalar": 16}),
    "gemma3_text_capped": ("gemma3_text", {**_WIDE, **_HEAD, **_TIED, **_MIXED, **_NESTED, **_CAPPED}),
    "gemma3_text_irregular": (
        "gemma3_text",
        {**_WIDE, **_HEAD, **_TIED, **_MIXED, **_PLAIN_NESTED, "layer_types": [SLIDING, FULL, *[SLIDING] * 3, FULL]},
    ),
    "gemma4_text": (
        "gemma4_text",
        {**_WIDE, **_HEAD, **_TIED, **_MIXED, "global_head_dim": 16, "num_kv_shared_layers": 0}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE, "final_logit_softcapping": 5.0}
        | {
            "rope_parameters": {
                FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": _THETA},
                SLIDING: {"rope_type": "default", "rope_theta": 3000.0},
            }
        },
    ),
    "phi_qk": ("phi", {**_HALF, "qk_layernorm": True}),
    "phi3": ("phi3", {**_ROPE, "sliding_window": None}),
    "phi3_half": ("phi3", _HALF),
    "phi3_window": ("phi3", {**_ROPE, "sliding_window": WINDOW}),
    "phi3_longrope": ("phi3", {**_LONGROPE, "original_max_position_embeddings": _ORIGINAL}),
    "phimoe": ("phimoe", {**_ROPE, **_EXPERTS, "attention_bias": True, "lm_head_bias": True}),
    "stablelm_qk": ("stablelm", {**_HALF, "qk_layernorm": True}),
    "stablelm_parallel": ("stablelm", {**_HALF, "use_parallel_residual": True}),
    "gpt_neox_parallel": ("gpt_neox", {**_HALF, "intermediate_size": 128, "use_parallel_residual": True}),
    "deepseek_v2": (
        "deepseek_v2",
        {**_MLA, **_ROUTED, **_rope(**_SCALINGS["yarn"], mscale=0.7, mscale_all_dim=1.0), "norm_topk_prob": False}
        | {"topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2_plain": (
        "deepseek_v2",
        {**_MLA, **_ROUTED, **_ROPE, "q_lora_rank": None, "norm_topk_prob": False, "topk_method": "greedy"},
    ),
    "deepseek_v2_normed": ("deepseek_v2", {**_MLA, **_ROUTED, **_ROPE, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**_MLA, **_ROUTED, **_rope(**_SCALINGS["yarn"], mscale=0.7, mscale_all_dim=1.0)}),
    "deepseek_v3_yarn": ("deepseek_v3", {**_MLA, **_ROUTED, **_rope(**_SCALINGS["yarn"])}),
    "deepseek_v3_plain": ("deepseek_v3", {**_MLA, **_ROUTED, **_ROPE}),
    "deepseek_v3_halves": ("deepseek_v3", {**_MLA, **_ROUTED, **_ROPE, "rope_interleave": False}),
    "deepseek_v3_linear": ("deepseek_v3", {**_MLA, **_ROUTED, **_rope(**_SCALINGS["linear"])}),
    "deepseek_v32": ("deepseek_v32", {**_MLA, **_ROUTED, **_ROPE, **_INDEXED}),
    "glm4_moe_lite": ("glm4_moe_lite", {**_MLA, **_ROUTED, **_ROPE}),
    "glm4_moe_qk": ("glm4_moe", {**_HALF, **_ROUTED, **_HEAD, "use_qk_norm": True}),
    "glm_moe_dsa": ("glm_moe_dsa", {**_MLA, **_ROUTED, **_ROPE, **_INDEXED}),
    "dots1_window": ("dots1", {**_ROPE, **_ROUTED, **_HEAD, **_MIXED}),
    "gpt_oss_yarn": ("gpt_oss", {**_rope(**_SCALINGS["yarn_exact"]), **_HEAD, **_SINKS}),
    "minicpm3": ("minicpm3", {**_MLA, **_ROPE, "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 3}),
    "ministral3": (
        "ministral3",
        {**_rope(**_SCALINGS["yarn"], llama_4_scaling_beta=0.1, mscale=1.0, mscale_all_dim=1.0), **_HEAD}
        | {"sliding_window": None},
    ),
    "mellum": ("mellum", {**_MIXED, **_PLAIN_NESTED, **_EXPERTS, **_HEAD, "mlp_layer_types": ["sparse"] * 6}),
    "laguna": (
        "laguna",
        {**_MIXED, **_EXPERTS, **_HEAD, "shared_expert_intermediate_size": 16}
        | {
            "rope_parameters": {
                FULL: {"rope_theta": _THETA, **_SCALINGS["yarn"], "partial_rotary_factor": 0.5},
                SLIDING: {"rope_type": "default", "rope_theta": 3000.0},
            }
        },
    ),
    "qwen3_5": ("qwen3_5_text", {**_HALF, **_HEAD, **_DELTA}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        {**_HALF, **_EXPERTS, **_HEAD, **_DELTA, "shared_expert_intermediate_size": 16},
    ),
    "olmo": ("olmo", _ROPE),
    "olmo_hybrid": ("olmo_hybrid", {**_ROPE, **_DELTA}),
    "bitnet": ("bitnet", _ROPE),
    "nanochat": ("nanochat", _ROPE),
    "gpt2": ("gpt2", {**_GPT, **_TIED}),
    "gpt2_inverse": ("gpt2", {**_GPT, **_TIED, "scale_attn_by_inverse_layer_idx": True}),
    "gpt_bigcode": ("gpt_bigcode", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "dbrx": (
        "dbrx",
        {**_ROPE, "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 256}
        | {"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}}
        | {"attn_config": {"kv_n_heads": 2, "rope_theta": _THETA, "clip_qkv": 8}},
    ),
    "mamba": ("mamba", {"state_size": 8}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 8}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 16}),
    "jamba": (
        "jamba",
        {"num_experts": 4, "num_experts_per_tok": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {**_HALF, **_WIDE, **_TIED, "attention_window_size": WINDOW, "lru_width": 64, "num_key_value_heads": 1}
        | {"block_types": ["recurrent", "attention"], "logits_soft_cap": 5.0},
    ),
    "nemotron_h": (
        "nemotron_h",
        {**_HEAD, "layers_block_type": [LINEAR, "moe", FULL, "moe"], "mamba_num_heads": 8, "mamba_head_dim": 8}
        | {"ssm_state_size": 8, "n_groups": 2, "chunk_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16},
    ),
    "minimax": ("minimax", {**_ROPE, **_EXPERTS, **_HEAD, "layer_types": [LINEAR, FULL] * 2, "block_size": 16}),
    "mimo_v2_flash": ("mimo_v2_flash", {**_ROUTED, **_HEAD, **_MIXED}),
    "llama4_text": (
        "llama4_text",
        {**_ROPE, **_HEAD, "num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 512}
        | {"interleave_moe_layer_step": 2},
    ),
    "kimi_linear": ("kimi_linear", {**_MLA, "linear_head_dim": 16, "linear_num_heads": 2}),
    "solar_open": ("solar_open", {**_ROPE, **_ROUTED, **_HEAD, "first_k_dense_replace": 0}),
}

_DEFINITION = "does not fit mlx-lm's"
_REFUSED: dict[str, str] = {
    "bitnet": _DEFINITION,
    "deepseek_v2_normed": "'norm_topk_prob'",
    "deepseek_v3_halves": "'rope_interleave'",
    "deepseek_v3_linear": "rope_type 'linear'",
    "gemma3_text_capped": "softcapping'",
    "gemma3_text_irregular": "layer_types puts full attention at irregular distances",
    "gpt2_inverse": "'scale_attn_by_inverse_layer_idx'",
    "kimi_linear": "'mlp_layer_types'",
    "llama4_text": "'(attn_temperature_tuning|num_local_experts|interleave_moe_layer_step)'",
    "mimo_v2_flash": "rope_parameters rotates sliding_attention layers otherwise",
    "minimax": _DEFINITION,
    "nanochat": _DEFINITION,
    "olmo": "mlx-lm has no model type 'olmo'",
    "olmo_hybrid": _DEFINITION,
    "olmoe_clip": "'clip_qkv'",
    "phi_qk": "'qk_layernorm'",
    "qwen2_moe_normed": "'norm_topk_prob'",
    "qwen2_moe_step": "'decoder_sparse_step'",
    "recurrent_gemma": "recurrent layers",
}
for _name in ("hunyuan_v1_dense", "nemotron", "qwen2_moe"):
    for _scaling in _SCALINGS:
        if not (_scaling == "linear" and _name != "hunyuan_v1_dense"):
            _REFUSED[f"{_name}+{_scaling}"] = f"rope_type '{_SCALINGS[_scaling]['rope_type']}'"

ALWAYS = frozenset({
    "llama", "llama+llama3", "llama+yarn_factor", "mistral_window", "qwen2+yarn", "qwen3", "granite", "gemma2",
    "gemma3_text", "phi3_longrope", "gpt_oss_yarn", "qwen3_moe+linear", "olmo2", "glm", "cohere", "smollm3",
    "deepseek_v3", "qwen2_moe_normed", "gemma3_text_capped",
})  # fmt: skip

UNTESTED: Mapping[str, str] = {
    "gemma3": "a wrapper of gemma3_text",
    "gemma3n": "a multimodal wrapper, refused at start",
    "gemma4": "a wrapper of gemma4_text",
    "gemma4_unified": "a wrapper of gemma4_text",
    "kimi_k25": "a multimodal wrapper, refused at start",
    "llama4": "a multimodal wrapper, refused at start",
    "llava": "a multimodal wrapper, refused at start",
    "longcat_flash": "transformers' forward does not run at this size",
    "minimax_m3_vl": "a multimodal wrapper, refused at start",
    "mistral3": "a multimodal wrapper, refused at start",
    "mistral4": "transformers has no text model of it by itself",
    "muse_glimmer": "a multimodal wrapper, refused at start",
    "pixtral": "a multimodal wrapper, refused at start",
    "qwen2_5_vl": "a multimodal wrapper, refused at start",
    "qwen2_vl": "a multimodal wrapper, refused at start",
    "qwen3_vl": "a multimodal wrapper, refused at start",
    "qwen3_vl_moe": "a multimodal wrapper, refused at start",
    "step3p5": "transformers has no text model of it by itself",
}
"""Shared families without a case -> why."""


def _cases() -> dict[str, Case]:
    found = dict(_BASES) | _OTHERS
    for name, (model_type, config) in _BASES.items():
        for scaling, parameters in _SCALINGS.items():
            rope = {**config["rope_parameters"], **parameters}
            found[f"{name}+{scaling}"] = (model_type, {**config, "rope_parameters": rope})
    return {
        name: Case(kind, config, _REFUSED.get(name), name in ALWAYS, config.get("index_topk"))
        for name, (kind, config) in found.items()
    }


CASES: dict[str, Case] = _cases()


def save(case: Case, directory: Path, length: int = LENGTH) -> tuple[np.ndarray, np.ndarray]:
    """Write `case` as transformers saves it; returns tokens int32 (1, length), logits float32 (length, vocab)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, **deepcopy({**_COMMON, **case.config}))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for parameter in model.parameters():
        parameter.data += 0.15 * torch.randn_like(parameter)
    tokens = np.random.default_rng(0).integers(3, VOCAB_SIZE, (1, length)).astype(np.int32)
    with torch.no_grad():
        logits = model(torch.tensor(tokens).long(), use_cache=False).logits[0].numpy()
    model.save_pretrained(directory)
    return tokens, logits


def table() -> str:
    """The table of families in Markdown, with its heading row."""
    families: dict[str, list[str]] = {}
    for name, case in CASES.items():
        families.setdefault(case.model_type, []).append(name)
    rows = [_row(family, names) for family, names in families.items()]
    rows += [f"| {family} | | not compared: {reason} |" for family, reason in UNTESTED.items()]
    return "\n".join(["| family | right | refused by name |", "|---|---|---|", *sorted(rows)])


def _row(family: str, names: list[str]) -> str:
    def label(name: str) -> str:
        stem = name.removeprefix(family.removesuffix("_text"))
        return stem.lstrip("_+").replace("_", " ") or "base"

    right = [label(name) for name in names if CASES[name].refused is None]
    refused = [label(name) for name in names if CASES[name].refused is not None]
    return f"| {family} | {', '.join(right)} | {', '.join(refused)} |"


def document(text: str) -> str:
    """`text` of docs/testing.md with the table as it is to be."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    DOC.write_text(document(DOC.read_text()))
