"""Tiny random-weight mlx-lm models, one per family, and checkpoints of them on disk: what the parity tests run on.

    TINY[name] (config.json) --build--> nn.Module in float32
                             --write_checkpoint--> directory that mlx_lm.load and vLLM's ModelConfig both read

Weights are mlx-lm's initialisation plus N(0, 0.2) on every floating parameter, norms, biases and sinks included, so
that no parameter can be left out unnoticed. The final norm gets N(0, 2), lest a model with tied embeddings do nothing
but repeat its last token. A name may differ from its `model_type` ("llama_sliding" is a llama).
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

Config = dict[str, Any]

VOCAB_SIZE = 128
BOS, EOS, PAD = 1, 2, 0
SLIDING, FULL = "sliding_attention", "full_attention"
MIXED_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL]
WINDOW = 4

_NOISE, _FINAL_NORM_NOISE = 0.2, 2.0

_COMMON: Config = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "dtype": "float32",
}
_PLAIN_ROPE: Config = {"rope_type": "default", "rope_theta": 10000.0}
_UNTIED: Config = {"tie_word_embeddings": False}
_NO_BIAS: Config = {"attention_bias": False, "mlp_bias": False}
_EXPERTS: Config = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
_LOCAL_EXPERTS: Config = {"num_local_experts": 4, "num_experts_per_tok": 2}
_SIX_MIXED: Config = {"num_hidden_layers": 6, "sliding_window": WINDOW, "layer_types": MIXED_LAYERS}
_MLA: Config = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 12,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "head_dim": 4,  # the rotated part, as transformers has it
    "v_head_dim": 8,
    **_UNTIED,
}
_YARN: Config = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 1.0,
    }
}
_DEEPSEEK_EXPERTS: Config = {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_UNNORMED: Config = {**_DEEPSEEK_EXPERTS, "norm_topk_prob": False}  # as DeepSeek V2 was released
_GROUPED: Config = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 2, "topk_group": 1}
_GRANITE: Config = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.35,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    **_NO_BIAS,
}

_FAMILIES: dict[str, tuple[str, str, Config]] = {
    # name: (model_type, architecture, what differs from _COMMON)
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama_untied": ("llama", "LlamaForCausalLM", {**_UNTIED, "num_hidden_layers": 2}),
    "llama3_rope": (
        "llama",
        "LlamaForCausalLM",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama_sliding": ("llama", "LlamaForCausalLM", _SIX_MIXED),
    "mistral": ("mistral", "MistralForCausalLM", {"sliding_window": None, **_UNTIED}),
    "mistral_sliding": ("mistral", "MistralForCausalLM", {**_SIX_MIXED, **_UNTIED}),
    "ministral3": (
        "ministral3",
        "Ministral3ForCausalLM",
        {
            **_SIX_MIXED,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {}),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**_EXPERTS, "norm_topk_prob": False, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM", {**_EXPERTS, **_UNTIED}),
    "gemma": ("gemma", "GemmaForCausalLM", {}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "query_pre_attn_scalar": 8,
            "sliding_window": 512,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 6,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "layer_types": MIXED_LAYERS,
            "query_pre_attn_scalar": 8,
            "rope_local_base_freq": 1000.0,
        },
    ),
    "phi": (
        "phi",
        "PhiForCausalLM",
        {"num_key_value_heads": 4, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, **_UNTIED},
    ),
    "phi3": ("phi3", "Phi3ForCausalLM", {**_UNTIED, "original_max_position_embeddings": 512}),
    "phi3_longrope": (
        "phi3",
        "Phi3ForCausalLM",
        {
            **_UNTIED,
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0, 1.5, 2.0, 4.0],
                "short_factor": [1.0, 1.0, 1.0, 1.0],
            },
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {
            **_LOCAL_EXPERTS,
            **_UNTIED,
            "sliding_window": WINDOW,
            "layer_types": [SLIDING, FULL] * 2,
            "rope_scaling": None,
            "rope_parameters": _PLAIN_ROPE,  # else transformers assumes the released model's YaRN
        },
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {**_LOCAL_EXPERTS, **_UNTIED, "sliding_window": None}),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", {}),
    "olmo3": ("olmo3", "Olmo3ForCausalLM", _SIX_MIXED),
    "olmoe": ("olmoe", "OlmoeForCausalLM", {**_EXPERTS, **_UNTIED}),
    "granite": ("granite", "GraniteForCausalLM", _GRANITE),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM", {**_GRANITE, **_LOCAL_EXPERTS}),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", {"no_rope_layer_interval": 3, "no_rope_layers": [1, 1, 0, 1]}),
    "cohere": ("cohere", "CohereForCausalLM", {"layer_norm_eps": 1e-5, "logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": (
        "cohere2",
        "Cohere2ForCausalLM",
        {
            "num_hidden_layers": 6,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "layer_types": MIXED_LAYERS,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.5,
        },
    ),
    "exaone4": (
        "exaone4",
        "Exaone4ForCausalLM",
        {**_SIX_MIXED, "sliding_window_pattern": "LLG", "rope_scaling": None},
    ),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", {"norm_epsilon": 1e-5, "sliding_window": None}),
    "stablelm": (
        "stablelm",
        "StableLmForCausalLM",
        {"use_qkv_bias": True, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5, **_UNTIED},
    ),
    "glm": ("glm", "GlmForCausalLM", {"attention_bias": True, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", "Glm4ForCausalLM", {"attention_bias": True, "partial_rotary_factor": 0.5, **_UNTIED}),
    "helium": ("helium", "HeliumForCausalLM", _NO_BIAS),
    "seed_oss": ("seed_oss", "SeedOssForCausalLM", {"attention_bias": True, "attention_out_bias": False}),
    "ernie4_5": ("ernie4_5", "Ernie4_5ForCausalLM", {"use_bias": False}),
    "nemotron": (
        "nemotron",
        "NemotronForCausalLM",
        {"hidden_act": "relu2", "norm_eps": 1e-5, "partial_rotary_factor": 0.5, **_UNTIED},
    ),
    "gpt_neox": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {
            "num_key_value_heads": 4,
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.5,
            **_UNTIED,
        },
    ),
    "internlm3": ("internlm3", "InternLM3ForCausalLM", {"qkv_bias": True}),
    "mimo": ("mimo", "MiMoForCausalLM", {"num_nextn_predict_layers": 0, "attention_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", {"attention_bias": False}),
    "deepseek_v2": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {**_MLA, **_YARN, **_UNNORMED, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
    ),
    "deepseek_v2_lite": (
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        {**_MLA, **_YARN, **_UNNORMED, "q_lora_rank": None, "topk_method": "greedy", "num_hidden_layers": 2},
    ),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3ForCausalLM", {**_MLA, **_YARN, **_DEEPSEEK_EXPERTS, **_GROUPED}),
    "deepseek_v3_dense": (
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        {**_MLA, **_DEEPSEEK_EXPERTS, **_GROUPED, "q_lora_rank": None, "first_k_dense_replace": 9},
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        "Glm4MoeLiteForCausalLM",
        {**_MLA, **_DEEPSEEK_EXPERTS, "topk_method": "noaux_tc", "n_group": 1, "topk_group": 1, "v_head_dim": 10},
    ),
    "minicpm3": (
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            **_MLA,
            "rope_scaling": {
                "type": "longrope",
                "long_factor": [1.0, 1.5],
                "short_factor": [1.0, 1.0],
                "original_max_position_embeddings": 64,
            },
            "dim_model_base": 16,
            "scale_depth": 1.4,
            "scale_emb": 3,
        },
    ),
    "youtu_llm": ("youtu_llm", "YoutuForCausalLM", {**_MLA, "tie_word_embeddings": True}),
    "apertus": (
        "apertus",
        "ApertusForCausalLM",
        {
            **_NO_BIAS,
            "post_norm": False,
            "qk_norm": True,
            "hidden_act": "xielu",
            **_UNTIED,
            "rope_parameters": _PLAIN_ROPE,
        },
    ),
}

TINY: dict[str, Config] = {
    name: {**_COMMON, "model_type": model_type, "architectures": [architecture], **changes}
    for name, (model_type, architecture, changes) in _FAMILIES.items()
}
"""Name -> config.json. Hidden 32, 4 heads of 8, 2 or 4 key/value heads, 2 to 6 layers, vocabulary 128, float32."""


def build(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The mlx-lm model of `TINY[name]`, `overrides` laid over its config, with random float32 weights, evaluated."""
    config = {**TINY[name], **overrides}
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    if config["model_type"] == "gemma3_text":
        model.sanitize({})  # ties the head, as loading a checkpoint without one does

    def perturb(path: str, weight: mx.array) -> mx.array:
        if not mx.issubdtype(weight.dtype, mx.floating):
            return weight
        in_block = ".layers." in path or ".h." in path
        deviation = _NOISE if in_block or weight.ndim > 1 else _FINAL_NORM_NOISE
        return (weight + deviation * mx.random.normal(weight.shape)).astype(mx.float32)

    model.update(tree_map_with_path(perturb, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def write_checkpoint(name: str, directory: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write `build(name, seed)` as an mlx-lm directory, tokenizer included; returns `directory`.

    The tokenizer has one token per printable ASCII character (ids 3..97), thirty common pairs (98..127) and
    `<unk>` 0, `<s>` 1, `</s>` 2; text outside ASCII becomes `<unk>`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    model = build(name, seed, **overrides)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps({**TINY[name], **overrides}, indent=1))
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Write the tiny tokenizer.json and tokenizer_config.json, with a chat template."""
    characters = ["Ġ", *(chr(code) for code in range(33, 127))]  # byte-level spelling: Ġ is the space
    pairs = ["th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of"]
    pairs += ["ed", "is", "it", "al", "ar", "st", "to", "nt", "ng", "se", "ha", "as", "ou", "io", "le"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters, *pairs])}
    model = models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in pairs], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}</s>{% endfor %}[assistant] "
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
