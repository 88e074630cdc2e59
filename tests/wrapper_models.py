"""Tiny multimodal checkpoints in the formats in which they are released, and Gemma 4 text models.

    GEMMA4[name], HYBRIDS[name] --build_text--> mlx-lm's module, float32
                                --write_wrapper(blocks)-->   Hugging Face's directory: text model, towers, FP8 weights

What is written is what the releases hold: names under `model.language_model.`, tensors of vision and audio towers
beside them, convolutions in torch's order, norms of Qwen3.5 less one, experts in one tensor (or one by one, in FP8),
FP8 bytes with the inverse scales of their blocks. The encoder to FP8 is written from the definition of E4M3 (OCP 8-bit
floating point specification, revision 1.0, section 5), so that it repeats nothing of what it checks.
"""

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from hybrid_models import HYBRIDS, build_hybrid
from mlx.utils import tree_flatten
from tiny_models import FULL, SLIDING, TINY, WINDOW, build, write_tokenizer

Config = dict[str, Any]

_GEMMA4: Config = {
    "model_type": "gemma4_text",
    "architectures": ["Gemma4ForCausalLM"],
    "sliding_window": WINDOW,
    "head_dim": 8,
    "global_head_dim": 16,
    "final_logit_softcapping": 5.0,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 128,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "use_double_wide_mlp": False,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
}
_SMALL_LAYERS = [SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING, FULL]

GEMMA4: dict[str, Config] = {
    # E2B and E4B: per-layer embeddings, and the last layers attend over the K and V of earlier ones.
    "gemma4_small": {
        **_GEMMA4,
        "num_hidden_layers": 8,
        "layer_types": _SMALL_LAYERS,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 4,
        "hidden_size_per_layer_input": 8,
        "use_double_wide_mlp": True,
    },
    # 31B: wider heads, fewer K and V, and V made of K's projection in full layers.
    "gemma4_dense": {
        **_GEMMA4,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    # 26B-A4B: the same with experts beside each dense MLP.
    "gemma4_moe": {
        **_GEMMA4,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, SLIDING, FULL] * 2,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
}
"""Name -> what differs from tiny_models' llama: windows of 4, heads of 8 in sliding layers and of 16 in full ones."""


def build_text(name: str, **overrides: Any) -> nn.Module:
    """The text model `name` of GEMMA4 or HYBRIDS, random float32 weights, evaluated."""
    if name in GEMMA4:
        return build("llama", 0, **{**deepcopy(GEMMA4[name]), **overrides})
    return build_hybrid(name, **overrides)


def text_config(name: str) -> Config:
    """config.json of the text model by itself."""
    return {**TINY["llama"], **(GEMMA4 if name in GEMMA4 else HYBRIDS)[name]}


@dataclass(frozen=True)
class Wrapper:
    """A multimodal release. Attributes: architecture, model_type: of config.json. towers: tensors that are no text."""

    architecture: str
    model_type: str
    towers: tuple[str, ...]


_QWEN_TOWERS = (
    "model.visual.patch_embed.proj.weight",
    "model.visual.blocks.0.attn.qkv.weight",
    "model.visual.merger.linear_fc1.weight",
    "mtp.fc.weight",
    "mtp.layers.0.self_attn.q_proj.weight",
)
_GEMMA_TOWERS = (
    "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
    "model.embed_vision.embedding_projection.weight",
    "model.audio_tower.layers.0.feed_forward1.ffw_layer_1.linear.weight",
    "model.embed_audio.embedding_projection.weight",
)

WRAPPED: dict[str, Wrapper] = {
    **{name: Wrapper("Gemma4ForConditionalGeneration", "gemma4", _GEMMA_TOWERS) for name in GEMMA4},
    "qwen3_5": Wrapper("Qwen3_5ForConditionalGeneration", "qwen3_5", _QWEN_TOWERS),
    "qwen3_5_moe": Wrapper("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", _QWEN_TOWERS),
}
"""Name of a text model -> what it is released in."""

_RELEASED: dict[str, Config] = {
    # What else the releases' text_config holds: nothing of it may matter to a text model.
    "gemma4": {"use_bidirectional_attention": "vision"},
    "qwen3_5": {"mamba_ssm_dtype": "float32", "attn_output_gate": True, "mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {"mamba_ssm_dtype": "float32", "attn_output_gate": True, "mtp_num_hidden_layers": 1},
}
_MROPE: Config = {"mrope_interleaved": True, "mrope_section": [1, 1, 0]}

VISION: Config = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "num_attention_heads": 2}


def wrapper_config(name: str, blocks: tuple[int, int] | None = None) -> Config:
    """config.json around the text model `name`; `blocks` of its FP8 weights."""
    wrapper = WRAPPED[name]
    text, kind = {k: v for k, v in text_config(name).items() if k != "architectures"}, wrapper.model_type
    text |= _RELEASED[kind]
    if kind != "gemma4":
        text["rope_parameters"] = {**text["rope_parameters"], **_MROPE}
    if kind == "qwen3_5_moe":
        del text["intermediate_size"]  # there are experts alone
    config: Config = {
        "architectures": [wrapper.architecture],
        "model_type": kind,
        "text_config": {**text, "model_type": "gemma4_text" if kind == "gemma4" else f"{kind}_text"},
        "vision_config": {**VISION, "model_type": "gemma4_vision" if kind == "gemma4" else kind},
        "image_token_id": 126,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }
    if blocks is not None:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(blocks),
            "modules_to_not_convert": ["lm_head", "model.visual"],
        }
    return config


def released_tensors(name: str) -> dict[str, np.ndarray]:
    """The tensors of the dense release of `build_text(name)`, towers included."""
    rng = np.random.default_rng(5)
    arrays = {path: np.array(value) for path, value in tree_flatten(build_text(name).parameters())}
    tensors: dict[str, np.ndarray] = {}
    for path, value in arrays.items():
        released = path.removeprefix("language_model.").replace("model.", "model.language_model.", 1)
        if ".switch_mlp.down_proj." in path or ".switch_glu.down_proj." in path:
            tensors[_experts(released) + ".down_proj"] = value
        elif ".switch_mlp.gate_proj." in path or ".switch_glu.gate_proj." in path:
            up = arrays[path.replace("gate_proj", "up_proj")]
            tensors[_experts(released) + ".gate_up_proj"] = np.concatenate([value, up], axis=1)
        elif ".switch_" not in path:
            tensors[released] = _as_released(name, path, value)
    if name in GEMMA4:  # releases hold projections that layers with shared K and V do not use
        for layer in range(GEMMA4[name]["num_hidden_layers"]):
            for kind in ("k_proj", "v_proj"):
                unused = f"model.language_model.layers.{layer}.self_attn.{kind}.weight"
                if layer >= GEMMA4[name]["num_hidden_layers"] - GEMMA4[name]["num_kv_shared_layers"]:
                    tensors[unused] = rng.standard_normal((8, 32)).astype(np.float32)
    towers = {tower: rng.standard_normal((32, 32)).astype(np.float32) for tower in WRAPPED[name].towers}
    return tensors | towers


def _experts(released: str) -> str:
    return released.split(".switch_")[0] + ("" if released.split(".switch_")[0].endswith(".experts") else ".experts")


def _as_released(name: str, path: str, value: np.ndarray) -> np.ndarray:
    if name in GEMMA4:
        return value
    if path.endswith("conv1d.weight"):
        return np.moveaxis(value, 2, 1)
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight", "q_norm.weight", "k_norm.weight")
    return value - 1 if path.endswith((*norms, "model.norm.weight")) else value


Damage = Mapping[str, Callable[[np.ndarray], np.ndarray | None]]
"""Name of a tensor -> what is written in its place; None for nothing."""


def write_wrapper(
    name: str, directory: Path, blocks: tuple[int, int] | None = None, damage: Damage | None = None
) -> Path:
    """Write the release of `build_text(name)`, in FP8 with scales for `blocks` if given; returns `directory`.

    Within it `directory`/dense holds the same model with its weights as the FP8 ones round them, for a reference.
    """
    tensors = released_tensors(name)
    packed = {key: ("F32", value) for key, value in tensors.items()}
    if blocks is not None:
        dense, packed = in_fp8(tensors, blocks)
        write_release(directory / "dense", {key: ("F32", value) for key, value in dense.items()}, wrapper_config(name))
    for key, change in (damage or {}).items():
        dtype, value = packed.pop(key)
        if (changed := change(value)) is not None:
            packed[key] = (dtype, changed)
    write_release(directory, packed, wrapper_config(name, blocks))
    return directory


def release(name: str, blocks: tuple[int, int] | None, folder: Path) -> Path:
    """`write_wrapper` in a folder that a module's tests share, once."""
    directory = folder / f"{name}-{blocks}"
    return directory if directory.exists() else write_wrapper(name, directory, blocks)


def write_release(directory: Path, tensors: Mapping[str, tuple[str, np.ndarray]], config: Config) -> None:
    """A directory with these tensors (dtype, array), this config.json and the tiny tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(directory)


def write_safetensors(file: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    """(dtype, array) of each tensor; FP8 as its bytes, which no numpy type has (format: huggingface/safetensors)."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            opened.write(np.ascontiguousarray(array).tobytes())


def _e4m3(code: int) -> float:
    exponent, mantissa = code >> 3 & 15, code & 7
    return mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([_e4m3(code) for code in range(127)], np.float32)
"""The non-negative finite numbers in order of their codes; the largest is 448, and code 127 is not a number."""


def to_fp8(weight: np.ndarray, blocks: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes uint8, inverse scales float32, the weight that they stand for float32) of a matrix."""
    rows, columns = (
        [range(at, min(at + edge, size)) for at in range(0, size, edge)]
        for edge, size in zip(blocks, weight.shape, strict=True)
    )
    codes, exact = np.zeros(weight.shape, np.uint8), np.zeros(weight.shape, np.float32)
    scales = np.zeros((len(rows), len(columns)), np.float32)
    for i, down in enumerate(rows):
        for j, across in enumerate(columns):
            block = np.ix_(down, across)
            scales[i, j] = np.abs(weight[block]).max() / E4M3[-1]
            scaled = np.abs(weight[block]) / scales[i, j]
            code = np.abs(scaled[..., None] - E4M3).argmin(-1)
            codes[block] = code + 128 * (weight[block] < 0)
            exact[block] = np.sign(weight[block]) * E4M3[code] * scales[i, j]
    return codes, scales, exact


_KEPT_DENSE = ("embed", "lm_head", "conv1d", "norm", "in_proj_a", "in_proj_b", ".gate.", "shared_expert_gate", "visual")


def in_fp8(
    tensors: Mapping[str, np.ndarray], blocks: tuple[int, int]
) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, np.ndarray]]]:
    """The dense tensors that an FP8 release stands for, and the release: experts one by one, as (dtype, array)."""
    dense: dict[str, np.ndarray] = {}
    packed: dict[str, tuple[str, np.ndarray]] = {}

    def pack(name: str, weight: np.ndarray) -> np.ndarray:
        codes, scales, exact = to_fp8(weight, blocks)
        packed[name], packed[f"{name}_scale_inv"] = ("F8_E4M3", codes), ("F32", scales)
        return exact

    for name, value in tensors.items():
        if name.endswith("experts.gate_up_proj"):
            halves = np.split(value, 2, axis=1)
            parts = [
                [
                    pack(name.replace("gate_up_proj", f"{index}.{kind}.weight"), weight)
                    for index, weight in enumerate(half)
                ]
                for kind, half in zip(("gate_proj", "up_proj"), halves, strict=True)
            ]
            dense[name] = np.concatenate([np.stack(part) for part in parts], axis=1)
        elif name.endswith("experts.down_proj"):
            parts = [pack(name.replace("down_proj", f"{index}.down_proj.weight"), w) for index, w in enumerate(value)]
            dense[name] = np.stack(parts)
        elif value.ndim == 2 and not any(part in name for part in _KEPT_DENSE):
            dense[name] = pack(name, value)
        else:
            dense[name], packed[name] = value, ("F32", value)
    return dense, packed
