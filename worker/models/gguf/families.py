"""Architectures: GGUF metadata -> config.json, and GGUF tensor names -> mlx-lm's.

Names and conventions are those of llama.cpp's converter (gguf-py/gguf/constants.py, convert_hf_to_gguf.py): llama's q
and k rows are permuted for interleaved RoPE, gemma's norm weights are stored with one added.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.gguf.metadata import Metadata
from pomarium.worker.models.gguf.reader import GgufFile
from pomarium.worker.models.gguf.rope import llama3_scaling, rope_scaling

ROPE_FREQS = "rope_freqs.weight"
_GEMMA3_PATTERN = 6  # llama.cpp fixes it: every sixth layer is global
_GEMMA3_27B_LAYERS = 62  # the one size whose attention scale is not head_dim ** -0.5

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
_SANDWICH_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture maps to mlx-lm."""

    model_type: str
    architecture: str
    blocks: Mapping[str, str]
    permuted_qk: bool = False
    norms_plus_one: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", {**_BLOCK, **_PRE_NORM}, permuted_qk=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", {**_BLOCK, **_PRE_NORM}),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", {**_BLOCK, **_PRE_NORM, **_QK_NORM}),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", {**_BLOCK, **_SANDWICH_NORM, **_QK_NORM}, norms_plus_one=True),
}


def family_of(metadata: Metadata) -> Family:
    """Raises UnsupportedError, naming the architecture, for one that is not in FAMILIES."""
    name = metadata.architecture
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(f"{metadata.path}: GGUF architecture {name!r} is not supported (only {known}).")
    return FAMILIES[name]


def mlx_name(family: Family, name: str, layers: int) -> str | None:
    """mlx-lm's name of a GGUF tensor; None for those that carry no weights. Raises KeyError for an unknown one."""
    parts = name.split(".")
    if name == ROPE_FREQS:
        return None
    if len(parts) == 2:
        return f"{_OUTER[parts[0]]}.{parts[1]}"
    if len(parts) != 4 or parts[0] != "blk" or not parts[1].isdecimal() or int(parts[1]) >= layers:
        raise KeyError(name)
    return f"model.layers.{int(parts[1])}.{family.blocks[parts[2]]}.{parts[3]}"


def model_config(file: GgufFile, family: Family) -> dict[str, Any]:
    """config.json without `quantization` and token ids.

    Raises:
        CheckpointError: a key is missing or contradicts another.
        UnsupportedError: a feature that mlx-lm's model of this family lacks.
    """
    metadata = Metadata(file.path, file.metadata)
    own = metadata.own
    if metadata.optional(own("expert_count"), int):
        raise UnsupportedError(f"{file.path}: mixture-of-experts models are not supported as GGUF files.")
    if "token_embd.weight" not in file.tensors or len(file.tensors["token_embd.weight"].shape) != 2:
        raise CheckpointError(f"{file.path} is incomplete: the tensor 'token_embd.weight' is missing.")
    hidden, heads = metadata.positive(own("embedding_length")), metadata.positive(own("attention.head_count"))
    config: dict[str, Any] = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "hidden_size": hidden,
        "intermediate_size": metadata.positive(own("feed_forward_length")),
        "num_hidden_layers": metadata.positive(own("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.optional(own("attention.head_count_kv"), int) or heads,
        "head_dim": _head_dim(metadata, hidden, heads),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": metadata.positive(own("context_length")),
        "rms_norm_eps": metadata.required(own("attention.layer_norm_rms_epsilon"), float),
        "rope_theta": metadata.optional(own("rope.freq_base"), float) or 10000.0,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "hidden_act": "silu",
    }
    scaling = _scaling(file, metadata, config)
    if scaling is not None:
        config["rope_scaling"] = scaling
    if family.model_type == "gemma3_text":
        config |= _gemma3(metadata, config)
    elif metadata.optional(own("attention.sliding_window"), int):
        raise UnsupportedError(f"{file.path}: a sliding window is not supported in {family.model_type} GGUF files.")
    if family.model_type == "llama":
        config |= _llama_biases(file)
    return config


def _head_dim(metadata: Metadata, hidden: int, heads: int) -> int:
    declared = metadata.optional(metadata.own("attention.key_length"), int)
    if declared is None and hidden % heads:
        raise CheckpointError(f"{metadata.path}: {heads} heads do not divide the embedding length {hidden}.")
    head_dim = declared or hidden // heads
    if (metadata.optional(metadata.own("attention.value_length"), int) or head_dim) != head_dim:
        raise UnsupportedError(f"{metadata.path}: keys and values of different widths are not supported.")
    if (metadata.optional(metadata.own("rope.dimension_count"), int) or head_dim) != head_dim:
        raise UnsupportedError(f"{metadata.path}: RoPE over a part of each head is not supported.")
    if head_dim <= 0 or head_dim % 2:
        raise CheckpointError(f"{metadata.path}: a head width of {head_dim} is not possible.")
    return head_dim


def _scaling(file: GgufFile, metadata: Metadata, config: dict[str, Any]) -> dict[str, Any] | None:
    if ROPE_FREQS not in file.tensors:
        return rope_scaling(metadata)
    if file.tensors[ROPE_FREQS].nbytes != 2 * config["head_dim"]:
        raise CheckpointError(f"{file.path}: its rope_freqs.weight does not fit heads of {config['head_dim']}.")
    divisors = file.raw(ROPE_FREQS).view(np.float32)[0]
    return llama3_scaling(metadata, divisors, config["rope_theta"])


def _gemma3(metadata: Metadata, config: dict[str, Any]) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    declared = metadata.values.get(metadata.own("attention.sliding_window_pattern"), _GEMMA3_PATTERN)
    if isinstance(declared, list):  # one flag per layer, true where it slides
        declared = next((i + 1 for i, slides in enumerate(declared) if not slides), layers + 1)
    if not isinstance(declared, int) or declared < 1:
        raise CheckpointError(f"{metadata.path}: its sliding window pattern is {declared!r}.")
    if declared > layers:  # mlx-lm's definition looks for the first global layer
        raise UnsupportedError(f"{metadata.path}: a gemma3 model of {layers} layers, none of them global, is not run.")
    scalar = config["head_dim"]
    if layers == _GEMMA3_27B_LAYERS:
        scalar = config["hidden_size"] // config["num_attention_heads"]
    return {
        "sliding_window": metadata.positive(metadata.own("attention.sliding_window")),
        "sliding_window_pattern": declared,
        "layer_types": ["full_attention" if (i + 1) % declared == 0 else "sliding_attention" for i in range(layers)],
        "rope_local_base_freq": metadata.optional(metadata.own("rope.freq_base_swa"), float) or 10000.0,
        "query_pre_attn_scalar": scalar,
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _llama_biases(file: GgufFile) -> dict[str, Any]:
    found = {name for name in ("attn_q", "attn_k", "attn_v", "attn_output") if f"blk.0.{name}.bias" in file.tensors}
    if found and len(found) < 4:
        raise UnsupportedError(f"{file.path}: biases on only some of the attention projections are not supported.")
    return {"attention_bias": bool(found), "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
