"""config.json in transformers 5's form and in mlx-lm's: translated, left alone, or refused by name."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import _get_classes

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.forms.completion import completed
from pomarium.worker.models.forms.unread import TABLE, table
from pomarium.worker.models.forms.windows import layer_windows

TESTS = Path(__file__).parents[2]

Config = dict[str, Any]

HERE = Path("here")
SLIDING, FULL = "sliding_attention", "full_attention"
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA: Config = {"model_type": "llama", "hidden_act": "silu", "max_position_embeddings": 256}

RELEASED: dict[str, Config] = {
    # What matters of config.json as models were released, before transformers 5.
    "Llama 3.1": LLAMA
    | {
        "rope_theta": 5e5,
        "pretraining_tp": 1,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "Llama, by a trainer": LLAMA
    | {"_name_or_path": "x", "unsloth_version": "2025.1", "unsloth_fixed": True, "use_cache": False, "rope_theta": 1e4},
    "Mistral 7B 0.1": {"model_type": "mistral", "hidden_act": "silu", "sliding_window": 4096, "rope_theta": 1e4},
    "Qwen 2.5": {
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "use_mrope": False,
        "rope_theta": 1e6,
    },
    "Qwen 1.5 MoE": {
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "qkv_bias": True,
        "shared_expert_intermediate_size": 5632,
        "rope_theta": 1e6,
    },
    "Qwen3 MoE": {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "num_experts": 128,
        "rope_scaling": None,
        "rope_theta": 1e6,
    },
    "Gemma": {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": None, "rope_theta": 1e4},
    "Gemma 2": {
        "model_type": "gemma2",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "cache_implementation": "hybrid",
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "query_pre_attn_scalar": 256,
    },
    "Gemma 3": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "sliding_window_pattern": 6,
    },
    "Phi 2": {"model_type": "phi", "hidden_act": "gelu_new", "qk_layernorm": False, "partial_rotary_factor": 0.4},
    "Phi 3 mini": {"model_type": "phi3", "sliding_window": 2047, "rope_scaling": None, "attention_bias": False},
    "Phi 3.5 MoE": {
        "model_type": "phimoe",
        "attention_bias": True,
        "lm_head_bias": True,
        "input_jitter_noise": 0.01,
        "router_jitter_noise": 0.01,
        "sliding_window": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": [1.0],
            "short_factor": [1.0],
            "long_mscale": 1.24,
            "short_mscale": 1.24,
            "original_max_position_embeddings": 4096,
            "type": "longrope",
        },
    },
    "GPT-OSS": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "swiglu_limit": 7.0,
        "rope_theta": 150000,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "max_position_embeddings": 131072,
    },
    "DeepSeek V3": {
        "model_type": "deepseek_v3",
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "DeepSeek V2 Lite": {
        "model_type": "deepseek_v2",
        "norm_topk_prob": False,
        "topk_method": "greedy",
        "rope_theta": 10000,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
    },
    "GLM 4": {"model_type": "glm4", "attention_bias": True, "partial_rotary_factor": 0.5, "rope_theta": 1e4},
    "GLM 4.5": {
        "model_type": "glm4_moe",
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
        "rope_theta": 1e6,
        "num_nextn_predict_layers": 1,
        "use_qk_norm": True,
    },
    "SmolLM3": {"model_type": "smollm3", "use_sliding_window": False, "layer_types": [FULL], "max_window_layers": 28},
    "OLMo 2": {"model_type": "olmo2", "rope_scaling": None, "rope_theta": 5e5},
    "OLMoE": {"model_type": "olmoe", "clip_qkv": None, "norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    "Granite 3": {
        "model_type": "granite",
        "attention_multiplier": 0.015,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "rope_scaling": None,
        "rope_theta": 1e7,
    },
    "StarCoder 2": {"model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "mlp_type": "default"}
    | {"norm_type": "layer_norm", "sliding_window": 4096, "use_bias": True, "rope_theta": 1e5},
    "StableLM 2": {"model_type": "stablelm", "partial_rotary_factor": 0.25, "qk_layernorm": False, "rope_theta": 1e4},
    "Command R": {"model_type": "cohere", "logit_scale": 0.0625, "use_qk_norm": False, "rope_theta": 8e6},
    "Command R7B": {
        "model_type": "cohere2",
        "cache_implementation": "hybrid",
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "sliding_window_pattern": 4,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
    },
    "Pythia": {"model_type": "gpt_neox", "hidden_act": "gelu", "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "Hunyuan": {
        "model_type": "hunyuan_v1_dense",
        "rope_theta": 1e4,
        "use_cla": False,
        "use_rotary_pos_emb": True,
        "rope_scaling": {
            "alpha": 1000.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "type": "dynamic",
        },
    },
    "Kimi K2, which transformers does not know": {"model_type": "kimi_k2", "rope_scaling": {"type": "yarn"}},
}


@pytest.mark.parametrize("name", RELEASED)
def test_releases_stay_as_they_are(name: str) -> None:
    """No key of a release is refused, and none of its own says anything else afterwards."""
    before = RELEASED[name]
    after = completed(HERE, before)
    assert after == {**after, **{key: value for key, value in before.items() if key != "rope_scaling"}}
    scaling = before.get("rope_scaling")
    if isinstance(scaling, dict):
        assert after["rope_scaling"] == {**after["rope_scaling"], **scaling}
    else:
        assert after.get("rope_scaling") is None


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LLAMA | {"rope_parameters": PLAIN}, {"rope_theta": 5e5, "rope_scaling": None}),
        (LLAMA | {"rope_parameters": PLAIN, "rope_theta": 5e5, "rope_scaling": None}, {"rope_theta": 5e5}),
        (
            LLAMA | {"rope_parameters": {**PLAIN, **YARN, "attention_factor": 1.0}},
            {"rope_scaling": {**YARN, "type": "yarn", "mscale": 0.0}},
        ),
        (
            LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}},
        ),
        (
            {
                "model_type": "gemma3_text",
                "layer_types": [SLIDING, SLIDING, FULL] * 2,
                "rope_parameters": {FULL: {**PLAIN, "rope_type": "linear", "factor": 8.0}, SLIDING: PLAIN},
            },
            {
                "rope_theta": 5e5,
                "rope_local_base_freq": 5e5,
                "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0},
                "sliding_window_pattern": 3,
            },
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}},
            {"rotary_emb_base": 5e5, "rotary_pct": 0.25},
        ),
        ({"model_type": "qwen3_moe", "num_local_experts": 8, "rope_parameters": PLAIN}, {"num_experts": 8}),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", FULL]}, {"model_type": "qwen3_5"}),
        ({"model_type": "llama", "time_step_limit": [0.0, {"__float__": "Infinity"}]}, {"time_step_limit": [0, 1e999]}),
        (
            {"model_type": "exaone4", "layer_types": [SLIDING, FULL], "rope_parameters": PLAIN},
            {"sliding_window_pattern": "LG"},
        ),
    ],
)
def test_what_transformers_5_writes_is_found(config: Config, found: Config) -> None:
    after = completed(HERE, config)
    assert {key: after.get(key) for key in found} == found


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (LLAMA | {"rope_parameters": PLAIN, "rope_theta": 1e4}, r"rope_theta is 10000.0 and rope_parameters says"),
        (LLAMA | {"rope_parameters": PLAIN, "rope_scaling": YARN}, "rope_scaling and rope_parameters contradict"),
        (LLAMA | {"rope_parameters": {**PLAIN, "rope_type": "spiral"}}, "rope_parameters has rope_type 'spiral'"),
        (LLAMA | {"rope_parameters": {**PLAIN, "twist": 2}}, "rope_parameters has 'twist'"),
        (LLAMA | {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0\.5, not 1\.0"),
        (
            LLAMA | {"rope_parameters": {FULL: PLAIN, SLIDING: {**PLAIN, "rope_theta": 1.0}}},
            "rotates sliding_attention",
        ),
        (LLAMA | {"rope_parameters": [PLAIN]}, "rope_parameters is not a JSON object"),
        (LLAMA | {"hidden_act": "gelu"}, "'hidden_act': 'gelu'"),
        (LLAMA | {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping': 50.0"),
        (LLAMA | {"logits_scaling": 8.0}, "'logits_scaling': 8.0"),
        (
            {"model_type": "qwen3_moe", "num_local_experts": 8, "num_experts": 4},
            "num_local_experts is 8 and num_experts is 4",
        ),
        ({"model_type": "deepseek_v3", "rope_interleave": False}, "'rope_interleave': False"),
        ({"model_type": "recurrent_gemma"}, "recurrent_gemma is not served"),
    ],
)
def test_what_has_no_form_is_refused_by_name(config: Config, problem: str) -> None:
    with pytest.raises(UnsupportedError, match=f"^here: .*{problem}"):
        completed(HERE, config)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "phi3", "sliding_window": 64, "max_position_embeddings": 64}, ()),
        ({"model_type": "gemma2", "sliding_window": 8}, (8, None, 8)),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}, ()),
        (
            {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1, "use_sliding_window": True},
            (None, 8, 8),
        ),
        ({"model_type": "dots1", "sliding_window": 8, "layer_types": [FULL, SLIDING, FULL]}, (None, 8, None)),
        ({"model_type": "llama", "sliding_window": 8}, ()),
    ],
)
def test_windows(config: Config, windows: tuple[int | None, ...]) -> None:
    config = {"num_hidden_layers": 3, "max_position_embeddings": 128, **config}
    assert layer_windows(config, config["model_type"]) == windows


def test_the_table_of_unread_keys_is_that_of_the_installed_packages() -> None:
    """Otherwise: python tests/config_keys.py. In a process of its own, for vLLM enters classes of its own in
    transformers' registry where a test of this process has imported it."""
    command = [sys.executable, "-c", "import config_keys; print(config_keys.text(), end='')"]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=200, check=True)
    assert TABLE.read_text() == done.stdout
    assert json.loads(done.stdout) == table()


def test_every_family_of_the_tables_has_a_definition() -> None:
    for model_type in table():
        if model_type != "olmo":  # its module wants a package of its own
            _get_classes({"model_type": model_type})
