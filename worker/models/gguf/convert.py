"""A GGUF file -> an mlx-lm directory.

    read_header -> family_of, model_config -> one tensor at a time: MLX array -> safetensors shards, config.json
                -> read_vocabulary -> tokenizer.json, tokenizer_config.json, generation_config.json

Everything that can be refused is refused before the first weight is read. Peak memory is about one shard.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.gguf.families import Family, family_of, mlx_name, model_config
from pomarium.worker.models.gguf.metadata import Metadata
from pomarium.worker.models.gguf.quantization import AFFINE_BITS, GROUP_SIZE, to_affine, to_dense
from pomarium.worker.models.gguf.reader import GgufFile, TensorInfo, read_header
from pomarium.worker.models.gguf.tokenizer import build_tokenizer, tokenizer_config
from pomarium.worker.models.gguf.vocabulary import read_vocabulary

SHARD_BYTES = 1 << 30


def convert(
    path: Path,
    directory: Path,
    shard_bytes: int = SHARD_BYTES,
    generation: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write the model in `path` into the existing, empty `directory`.

    Args:
        generation: settings for generation_config.json beside the special tokens.

    Raises:
        CheckpointError: the file is truncated, damaged or incomplete.
        UnsupportedError: an architecture, tensor type, tokenizer or RoPE scaling that is not carried over.
    """
    file = read_header(path)
    metadata = Metadata(path, file.metadata)
    family = family_of(metadata)
    if (metadata.optional("split.count", int) or 1) > 1:
        raise UnsupportedError(f"{path} is one part of a split model; merge the parts with `gguf-split --merge` first.")
    if metadata.positive(metadata.own("block_count")) > len(file.tensors):
        raise CheckpointError(f"{path} is incomplete: it has fewer tensors than layers.")
    config = model_config(file, family)
    names = _checked_names(file, family, config)
    vocabulary = read_vocabulary(metadata, config["vocab_size"])
    tokenizer = build_tokenizer(metadata, vocabulary)

    quantization = _quantization(file, names)
    if quantization is not None:
        config["quantization"] = quantization
    config["dtype"] = _dtype(file, family)
    ids = {"bos_token_id": vocabulary.bos_id, "eos_token_id": _one_or_many(vocabulary.eos_ids)}
    ids["pad_token_id"] = vocabulary.padding_id
    config |= ids

    _write_weights(_arrays(file, family, names, config), directory, shard_bytes)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json", tokenizer_config(metadata, vocabulary, config["max_position_embeddings"])
    )
    known = {name: value for name, value in ids.items() if value is not None}
    _write_json(directory / "generation_config.json", {**known, **generation})
    _write_json(directory / "config.json", config)


def _checked_names(file: GgufFile, family: Family, config: dict[str, Any]) -> dict[str, str]:
    """GGUF name -> mlx-lm name, after checking that no tensor is missing, unknown or misshapen."""
    layers = config["num_hidden_layers"]
    names: dict[str, str] = {}
    for name in file.tensors:
        try:
            target = mlx_name(family, name, layers)
        except KeyError:
            raise UnsupportedError(f"{file.path}: its tensor {name!r} has no place in {family.model_type}.") from None
        if target is not None:
            names[name] = target
    needed = ["token_embd.weight", "output_norm.weight"]
    needed += [f"blk.{i}.{part}.weight" for i in range(layers) for part in family.blocks]
    if family.model_type == "qwen2":
        needed += [f"blk.{i}.{part}.bias" for i in range(layers) for part in ("attn_q", "attn_k", "attn_v")]
    for name in needed:
        if name not in names:
            raise CheckpointError(f"{file.path} is incomplete: the tensor {name!r} is missing.")
    shapes = _shapes(config)
    for name in names:
        part, suffix = name.split(".")[-2:]
        expected = shapes[part] if suffix == "weight" else shapes[part][:1]
        if suffix not in ("weight", "bias") or file.tensors[name].shape != expected:
            raise CheckpointError(f"{file.path}: tensor {name!r} is {file.tensors[name].shape}, not {expected}.")
    return names


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    norms = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    return {
        "token_embd": (config["vocab_size"], hidden),
        "output": (config["vocab_size"], hidden),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
        "attn_q_norm": (head,),
        "attn_k_norm": (head,),
        **dict.fromkeys(norms, (hidden,)),
    }


def _is_affine(tensor: TensorInfo) -> bool:
    return len(tensor.shape) == 2 and tensor.type in AFFINE_BITS


def _quantization(file: GgufFile, names: dict[str, str]) -> dict[str, Any] | None:
    """mlx-lm's `quantization`: the commonest width, and by module name those that differ."""
    bits = {
        target.removesuffix(".weight"): AFFINE_BITS[file.tensors[name].type]
        for name, target in names.items()
        if _is_affine(file.tensors[name])
    }
    if not bits:
        return None
    usual = Counter(bits.values()).most_common(1)[0][0]
    own = {n: {"group_size": GROUP_SIZE, "bits": b, "mode": "affine"} for n, b in bits.items() if b != usual}
    return {"group_size": GROUP_SIZE, "bits": usual, "mode": "affine", **own}


def _dtype(file: GgufFile, family: Family) -> str:
    """The dtype to compute in. Gemma 3 overflows float16."""
    kind = file.tensors["token_embd.weight"].type
    if family.norms_plus_one or kind is GGMLQuantizationType.BF16:
        return "bfloat16"
    return "float32" if kind is GGMLQuantizationType.F32 else "float16"


def _one_or_many(ids: list[int]) -> int | list[int] | None:
    if not ids:
        return None
    return ids[0] if len(ids) == 1 else ids


def _arrays(
    file: GgufFile, family: Family, names: dict[str, str], config: dict[str, Any]
) -> Iterator[tuple[str, mx.array]]:
    permuted = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, target in names.items():
        tensor, raw = file.tensors[name], file.raw(name)
        part = name.split(".")[-2]
        if family.permuted_qk and part in permuted:
            raw = _unpermute(raw.reshape(tensor.shape[0], -1), permuted[part])
        if _is_affine(tensor):
            affine = to_affine(raw, tensor.type)
            base = target.removesuffix("weight")
            yield from ((target, affine.weight), (base + "scales", affine.scales), (base + "biases", affine.biases))
            continue
        dense = to_dense(raw, tensor.type).reshape(tensor.shape)
        if family.norms_plus_one and part.endswith("norm"):
            dense = dense.astype(mx.float32) - 1
        yield target, dense


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k rows: (pair, half) back to (half, pair) within each head."""
    per_head = rows.reshape(heads, rows.shape[0] // heads // 2, 2, -1)
    return np.ascontiguousarray(per_head.swapaxes(1, 2)).reshape(rows.shape)


def _write_weights(arrays: Iterator[tuple[str, mx.array]], directory: Path, shard_bytes: int) -> None:
    """Shards of about `shard_bytes` and their index, named as mlx-lm names them."""
    shards: list[list[str]] = []
    shard: dict[str, mx.array] = {}
    total = 0

    def flush() -> None:
        path = directory / f"part-{len(shards)}.safetensors"
        mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
        shards.append(list(shard))
        shard.clear()

    for name, array in arrays:
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > shard_bytes:
            flush()
        shard[name] = array
        total += array.nbytes
    flush()
    count = len(shards)
    files = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for i, file_name in enumerate(files):
        (directory / f"part-{i}.safetensors").rename(directory / file_name)
    weight_map = {name: file_name for file_name, held in zip(files, shards, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
