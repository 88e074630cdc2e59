"""A model's profile, read from headers alone, agrees with its files, with the converter and with the worker's cache."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config
from safetensors.numpy import save_file
from tiny_gguf import write_gguf
from tiny_models import TINY, build, write_checkpoint
from vision_models import FAMILIES, write_seeing
from wrapper_models import GEMMA4, WRAPPED, build_text, write_wrapper

from pomarium.cluster.placement.model import Workload, memory_needed
from pomarium.cluster.placement.profile import (
    Profile,
    headers_of_directory,
    headers_of_gguf,
    profile_of,
    read_profile,
)
from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError
from pomarium.worker.models import embedded
from pomarium.worker.models.checkpoint import inspect
from pomarium.worker.models.gguf.convert import convert
from pomarium.worker.models.paged import prepare
from pomarium.worker.vision.tower import load_tower


def of_directory(directory: Path, name: str = "tiny") -> Profile:
    return profile_of(headers_of_directory(directory, name))


def of_gguf(file: Path, name: str = "tiny") -> Profile:
    return profile_of(headers_of_gguf(file, name))


def total(profile: Profile) -> int:
    return profile.model.weight_bytes + profile.left_out_bytes


@pytest.mark.parametrize("name", TINY)
def test_agrees_with_the_files_and_with_the_worker(name: str, tmp_path: Path) -> None:
    """Every byte is counted once, and K and V are what the worker caches per layer."""
    directory = write_checkpoint(name, tmp_path / name)
    profile = of_directory(directory)
    assert total(profile) == profile.stored_bytes == inspect(directory).bytes
    assert profile.left_out_bytes == profile.model.shared_bytes == 0
    module = build(name)
    parameters = dict(tree_flatten(module.parameters()))
    assert profile.model.weight_bytes == sum(a.nbytes for a in parameters.values())
    assert profile.model.tied == (not any("lm_head" in key or "embed_out" in key for key in parameters))
    assert profile.model.embedding_bytes == 128 * 32 * 4
    for index, layer in enumerate(profile.model.layers):
        own = [a.nbytes for key, a in parameters.items() if f".layers.{index}." in key or f".h.{index}." in key]
        assert layer.weight_bytes == sum(own)
    cached = prepare(module, TINY[name]["model_type"]).layers
    assert [(layer.kv_bytes, layer.window) for layer in profile.model.layers] == [
        (cache.elements * 4, cache.window) for cache in cached
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe"])
def test_experts_are_told_apart(name: str, tmp_path: Path) -> None:
    """Half of the experts work on a token; router and attention always do."""
    model = of_directory(write_checkpoint(name, tmp_path)).model
    parameters = dict(tree_flatten(build(name).parameters()))
    routed = sum(
        a.nbytes for k, a in parameters.items() if ".layers.0." in k and (".switch_mlp." in k or ".experts." in k)
    )
    layer = model.layers[0]
    assert layer.expert_bytes == routed > 0
    assert layer.active_share == 0.5
    assert layer.bytes_read(1) == layer.weight_bytes - routed / 2
    assert layer.flops == pytest.approx(2 * layer.bytes_read(1) / 4)


def quantised(name: str, directory: Path, **config: Any) -> Path:
    """An mlx-lm directory with 8-bit weights, the embedding at 4 bits, as mlx_lm.convert writes them."""
    write_checkpoint(name, directory, **config)
    model = build(name, **config)
    entry: dict[str, Any] = {"group_size": 32, "bits": 8, "mode": "affine"}
    four = {"group_size": 32, "bits": 4, "mode": "affine"}

    def width(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return isinstance(module, nn.Linear | nn.Embedding) and (four if "embed" in path else True)

    nn.quantize(model, 32, 8, class_predicate=width)
    entry["model.embed_tokens"] = four
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    save_config({**TINY[name], **config, "quantization": entry}, directory / "config.json")
    return directory


def test_quantised_weights_are_counted_as_stored(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96}
    dense = of_directory(write_checkpoint("llama", tmp_path / "dense", **sizes)).model
    small = of_directory(quantised("llama", tmp_path / "small", **sizes))
    assert total(small) == small.stored_bytes == inspect(tmp_path / "small").bytes
    assert small.model.embedding_bytes == 128 * 64 // 2 + 128 * 64 // 32 * 2 * 4
    assert small.model.layers[0].flops == dense.layers[0].flops
    assert small.model.head_flops == dense.head_flops == 2 * 128 * 64


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("llama", kind) for kind in (Kind.Q4_0, Kind.Q8_0, Kind.F16, Kind.Q6_K, Kind.F32)),
        *((name, Kind.Q4_1) for name in ("qwen2", "qwen3", "gemma3_text")),
    ],
)
def test_gguf_is_counted_as_it_will_be_converted(name: str, kind: Kind, tmp_path: Path) -> None:
    """All bytes of the file are seen, and the profile equals that of the directory the converter writes."""
    file = tmp_path / "tiny.gguf"
    write_gguf(name, file, kind, embedding=Kind.Q8_0)
    profile = of_gguf(file, "tiny")
    (tmp_path / "converted").mkdir()
    convert(file, tmp_path / "converted")
    after = of_directory(tmp_path / "converted", "tiny")
    assert profile.model == after.model
    assert replace(profile, model=after.model, stored_bytes=0) == replace(after, stored_bytes=0)
    assert after.stored_bytes == profile.model.weight_bytes
    assert profile.stored_bytes == sum(int(tensor.n_bytes) for tensor in GGUFReader(file).tensors)


def test_rope_frequencies_are_no_weights(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    write_gguf("llama", file, Kind.F16, rope_scaling={**scaling, "original_max_position_embeddings": 8192})
    profile = of_gguf(file)
    assert profile.left_out_bytes == 4 * 32


def test_the_embedded_model() -> None:
    """SmolLM2-135M: 30 layers, tied, 3 K/V heads of 64; nothing is converted for it."""
    profile = read_profile(None)
    model = profile.model
    assert (len(model.layers), model.tied, model.layers[0].kv_bytes) == (30, True, 2 * 3 * 64 * 2)
    assert profile.stored_bytes < embedded.gguf_file().stat().st_size < profile.stored_bytes * 1.05
    assert sum(layer.flops for layer in model.layers) / 2 + model.head_flops / 2 == pytest.approx(134.5e6, rel=0.01)
    assert model == read_profile("smollm2").model
    needed = sum(memory_needed(model, Workload(1024), 0, 30))
    assert needed == model.weight_bytes + 30 * 768 * (1024 + 16)


def test_multimodal_parts_and_speculation_layers_are_left_out(tmp_path: Path) -> None:
    """What mlx-lm drops takes no memory; the text model's sizes come from text_config."""
    config = {k: v for k, v in TINY["gemma3_text"].items() if k != "architectures"}
    weights = dict(tree_flatten(build("gemma3_text").parameters()))
    tensors = {f"language_model.{key}": np.array(a) for key, a in weights.items()}
    tensors["vision_tower.encoder.layers.0.weight"] = np.zeros((8, 8), np.float32)
    tensors["multi_modal_projector.weight"] = np.zeros((8, 8), np.float32)
    tensors["language_model.model.layers.6.self_attn.q_proj.weight"] = np.zeros((4, 4), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    profile = of_directory(tmp_path)
    assert profile.left_out_bytes == 2 * 256 + 64
    assert profile.model.weight_bytes == sum(a.nbytes for a in weights.values())
    assert profile.model.layers[0].window == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_of_a_family_that_sees_is_counted(family: str, tmp_path: Path) -> None:
    """As the worker holds it."""
    directory = write_seeing(family, tmp_path)
    profile, tower = of_directory(directory), load_tower(directory, mx.float32)
    assert profile.left_out_bytes == 0
    assert profile.model.shared_bytes == tower.weight_bytes
    assert total(profile) == profile.stored_bytes


@pytest.mark.parametrize("name", GEMMA4)
def test_gemma_4_in_its_wrapper_agrees_with_the_worker(name: str, tmp_path: Path) -> None:
    """Layers with heads of two sizes, and such as keep nothing; towers are left out."""
    profile = of_directory(write_wrapper(name, tmp_path))
    towers = len(WRAPPED[name].towers) * 32 * 32 * 4
    assert profile.left_out_bytes == towers
    assert total(profile) == profile.stored_bytes
    cached = [(cache.elements * 4, cache.window) for cache in prepare(build_text(name), "gemma4_text").layers]
    counted = [(layer.kv_bytes, layer.window) for layer in profile.model.layers]
    assert counted[: len(cached)] == cached
    assert all(kv_bytes == 0 for kv_bytes, _ in counted[len(cached) :])


def test_fp8_counts_twice_in_memory(tmp_path: Path) -> None:
    """mlx-lm expands FP8 blocks to 16 bits. The header is written by hand: numpy has no such dtype."""
    write_checkpoint("ministral3", tmp_path)
    header = {
        f"model.layers.{i}.mlp.up_proj.weight": {
            "dtype": "F8_E4M3",
            "shape": [64],
            "data_offsets": [64 * i, 64 * i + 64],
        }
        for i in range(6)
    }
    offset = 6 * 64
    raw = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(offset))
    config = {**TINY["ministral3"], "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    profile = of_directory(tmp_path)
    assert profile.model.layers[0].weight_bytes == 128
    assert profile.stored_bytes == offset


def test_what_is_damaged_or_unknown_is_refused(tmp_path: Path) -> None:
    directory = write_checkpoint("llama", tmp_path / "llama")
    config = json.loads((directory / "config.json").read_text())
    for change, sentence in (
        ({"num_hidden_layers": 9}, "layer 4 of 9 has no tensors"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"model_type": "nobody_knows"}, "no model type"),
    ):
        (directory / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(PomariumError, match=sentence):
            of_directory(directory)
    with pytest.raises(CheckpointError, match="no model"):
        read_profile("nowhere")
    write_gguf("llama", tmp_path / "odd.gguf", Kind.F16, extra={"general.architecture": "mamba"})
    with pytest.raises((UnsupportedError, CheckpointError)):
        read_profile(str(tmp_path / "odd.gguf"))


def test_overhead_grows_with_rows(tmp_path: Path) -> None:
    profile = of_directory(write_checkpoint("llama", tmp_path))
    one, two = (profile.stage_bytes(rows=rows, sampled=1) for rows in (1, 2))
    assert two - one == 48 * 4 * 6
