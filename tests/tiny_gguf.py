"""Tiny GGUF files made from tiny mlx-lm models, by llama.cpp's conventions and independently of our converter.

build(name) --write_gguf(kind)--> file, and the same model holding the weights that the file really encodes
"""

import json
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from mlx.utils import tree_flatten
from tiny_models import TINY, build, write_tokenizer

SIZES: dict[str, Any] = {  # rows of 256, which every block size divides
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
GEMMA3: dict[str, Any] = {  # what llama.cpp takes for granted
    "num_hidden_layers": 6,
    "sliding_window_pattern": 6,
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 64,
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_PARTS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    name: str, path: Path, kind: Kind, embedding: Kind | None = None, extra: dict[str, Any] | None = None, **config: Any
) -> nn.Module:
    """Write `TINY[name]` (with SIZES, GEMMA3 and `config`), matrices as `kind`; returns the float32 model it encodes.

    Args:
        embedding: kind of the token embedding, if it differs.
        extra: metadata to add; keys that begin with a dot get the architecture in front.
    """
    overrides = {**SIZES, **(GEMMA3 if name == "gemma3_text" else {}), **config}
    model = build(name, **overrides)
    config = {**TINY[name], **overrides}
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture)
    _write_config(writer, config)
    _write_tokenizer(writer)
    for key, value in (extra or {}).items():
        _write_value(writer, f"{architecture}{key}" if key.startswith(".") else key, value)
    encoded: list[tuple[str, mx.array]] = []
    for path_in_model, weight in tree_flatten(model.parameters()):
        wanted = embedding if embedding is not None and "embed_tokens" in path_in_model else kind
        encoded.append((path_in_model, _write_tensor(writer, path_in_model, np.array(weight), wanted, config)))
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_divisors(config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_weights(encoded)
    mx.eval(model.parameters())
    return model


def _write_config(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    if config["model_type"] == "gemma3_text":
        writer.add_sliding_window(config["sliding_window"])


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        model = json.loads((Path(folder) / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_token_list(pieces)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(pieces))])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _write_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_uint32(key, value)


def _gguf_name(path: str) -> str:
    parts = path.split(".")
    if path == "model.norm.weight":
        return "output_norm.weight"
    if "layers" not in parts:
        return f"{_PARTS[parts[-2]]}.{parts[-1]}"
    return f"blk.{parts[2]}.{_PARTS[parts[-2]]}.{parts[-1]}"


def _write_tensor(
    writer: gguf.GGUFWriter, path: str, weight: np.ndarray, kind: Kind, config: dict[str, Any]
) -> mx.array:
    gemma = config["model_type"] == "gemma3_text"
    if "post_attention_layernorm" in path:
        name = _gguf_name(path.replace("post_attention_layernorm", "input_layernorm"))
        name = name.replace("attn_norm", "post_attention_norm" if gemma else "ffn_norm")
    else:
        name = _gguf_name(path)
    if weight.ndim == 1 and "norm" in path:
        stored = weight + 1 if gemma else weight
        writer.add_tensor(name, stored.astype(np.float32))
        return mx.array(stored - 1 if gemma else stored)
    order = np.arange(weight.shape[0])
    if config["model_type"] == "llama" and ("q_proj" in path or "k_proj" in path):
        heads = config["num_attention_heads"] if "q_proj" in path else config["num_key_value_heads"]
        order = order.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    rows = weight[order]
    if weight.ndim == 1:
        writer.add_tensor(name, rows.astype(np.float32))
        return mx.array(weight)
    raw = encode(rows, kind)
    writer.add_tensor(name, raw, raw_dtype=kind)
    meant = np.empty_like(weight)
    meant[order] = quants.dequantize(raw, kind)
    return mx.array(meant)


def encode(rows: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks of `kind`; for K-quants, which the gguf package only decodes, random blocks of weights' size."""
    if kind is not Kind.Q6_K:
        return quants.quantize(rows.astype(np.float32), kind)
    blocks = np.random.default_rng(rows.size).integers(0, 256, (*rows.shape[:-1], rows.shape[-1] // 256, 210), np.uint8)
    blocks[..., 208:] = np.frombuffer(np.float16(8e-5).tobytes(), np.uint8)  # d, the last two bytes
    return blocks.reshape(*rows.shape[:-1], -1)


def llama3_divisors(config: dict[str, Any]) -> np.ndarray:
    """Llama 3.1's frequency divisors, float32 (head_dim / 2,), written out as in Meta's release."""

    def divisors() -> Iterator[float]:
        scaling = config["rope_scaling"]
        context, factor = scaling["original_max_position_embeddings"], scaling["factor"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        for i in range(0, config["head_dim"], 2):
            wavelength = 2 * math.pi * config["rope_theta"] ** (i / config["head_dim"])
            if wavelength < context / high:
                yield 1.0
            elif wavelength > context / low:
                yield factor
            else:
                smooth = (context / wavelength - low) / (high - low)
                yield 1 / ((1 - smooth) / factor + smooth)

    return np.array(list(divisors()), np.float32)
