"""A GGUF file, converted and loaded, computes what the model with the same dequantised weights computes."""

from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from equality import BOUND, logit_error
from gguf import GGMLQuantizationType as Kind
from mlx.utils import tree_flatten
from tiny_gguf import ARCHITECTURES, write_gguf

from pomarium.worker.models import embedded
from pomarium.worker.models.gguf.convert import convert
from pomarium.worker.models.load import load

EXACT = (Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q8_0)
TOKENS = mx.array([[5, 9, 44, 3, 77, 8, 120, 33, 64, 12, 91]])
HALF_WEIGHTS_BOUND = 2e-3
"""Relative to the largest logit, as equality.BOUND: weights that the file keeps at float16."""


@pytest.fixture(autouse=True)
def _cpu() -> None:
    mx.set_default_device(mx.cpu)


def _converted(file: Path, **options: Any) -> Path:
    directory = file.with_suffix("")
    directory.mkdir()
    convert(file, directory, **options)
    return directory


def _check(file: Path, model: Any, bound: float, *, dense: bool = True, **options: Any) -> dict[str, Any]:
    loaded = load(_converted(file, **options), dense=dense, dtype=mx.float32)
    expected, actual = model(TOKENS), loaded.model(TOKENS)
    assert expected.std().item() > 0.5
    error = logit_error(np.array(actual), np.array(expected))
    print(f"logits differ by {error:.1e} of the largest")
    assert error <= bound
    return loaded.config


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_weights_and_logits_are_those_of_the_file(name: str, kind: Kind, tmp_path: Path) -> None:
    model = write_gguf(name, tmp_path / "m.gguf", kind)
    loaded = load(_converted(tmp_path / "m.gguf"), dense=True, dtype=mx.float32)
    expected = dict(tree_flatten(model.parameters()))
    actual = dict(tree_flatten(loaded.model.parameters()))
    assert expected.keys() == actual.keys()
    for path, weight in expected.items():
        # Q4_1 rounds d * q + m once or twice, depending on who multiplies.
        assert mx.abs(weight - actual[path]).max().item() <= 1e-6, path
    assert logit_error(np.array(loaded.model(TOKENS)), np.array(model(TOKENS))) <= BOUND


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_k_quants_are_dequantised_to_float16(name: str, tmp_path: Path) -> None:
    model = write_gguf(name, tmp_path / "m.gguf", Kind.Q6_K)
    config = _check(tmp_path / "m.gguf", model, bound=HALF_WEIGHTS_BOUND)
    assert "quantization" not in config


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
def test_block_types_stay_quantised(kind: Kind, tmp_path: Path) -> None:
    model = write_gguf("llama", tmp_path / "m.gguf", kind)
    config = _check(tmp_path / "m.gguf", model, BOUND, dense=False)
    assert config["quantization"]["bits"] == (4 if kind is Kind.Q4_0 else 8)


def test_mixed_widths_are_named_in_the_config(tmp_path: Path) -> None:
    model = write_gguf("qwen2", tmp_path / "m.gguf", Kind.Q4_1, embedding=Kind.Q8_0)
    config = _check(tmp_path / "m.gguf", model, BOUND, dense=False)
    assert config["quantization"]["bits"] == 4
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8


def test_a_head_of_its_own_and_several_shards(tmp_path: Path) -> None:
    model = write_gguf("llama", tmp_path / "m.gguf", Kind.Q8_0, tie_word_embeddings=False)
    config = _check(tmp_path / "m.gguf", model, BOUND, shard_bytes=200_000)
    assert config["tie_word_embeddings"] is False
    assert len(list((tmp_path / "m").glob("model-*-of-*.safetensors"))) > 2


def test_attention_biases_of_llama_are_permuted_too(tmp_path: Path) -> None:
    model = write_gguf("llama", tmp_path / "m.gguf", Kind.F16, attention_bias=True)
    assert _check(tmp_path / "m.gguf", model, BOUND)["attention_bias"] is True


@pytest.mark.parametrize(("theta", "context"), [(500000.0, 8192), (10000.0, 64)])
def test_llama3_rope_is_recovered_from_its_divisors(theta: float, context: int, tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = context
    extra = {} if context == 8192 else {".rope.scaling.original_context_length": context}
    model = write_gguf("llama", tmp_path / "m.gguf", Kind.F16, extra=extra, rope_theta=theta, rope_scaling=scaling)
    assert _check(tmp_path / "m.gguf", model, BOUND)["rope_scaling"] == scaling


def test_yarn_and_linear_scaling_are_carried_over(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    extra = {
        ".rope.scaling.type": "yarn",
        ".rope.scaling.factor": 4.0,
        ".rope.scaling.original_context_length": 64,
    }
    model = write_gguf("qwen3", tmp_path / "y.gguf", Kind.F16, extra=extra, rope_scaling=yarn)
    assert _check(tmp_path / "y.gguf", model, BOUND)["rope_scaling"] == yarn
    linear = {"rope_type": "linear", "factor": 8.0}
    extra = {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0}
    model = write_gguf(
        "gemma3_text",
        tmp_path / "l.gguf",
        Kind.F16,
        extra={**extra, ".attention.sliding_window_pattern": 3},
        rope_scaling=linear,
        num_hidden_layers=3,
        sliding_window_pattern=3,
    )
    assert _check(tmp_path / "l.gguf", model, BOUND)["rope_scaling"] == linear


@pytest.mark.e2e
def test_smollm2_computes_what_its_dequantised_weights_compute() -> None:
    loaded = load(embedded.path(), dense=True, dtype=mx.float32)
    file = embedded.gguf_file()
    actual = dict(tree_flatten(loaded.model.parameters()))
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part == "attn_v":
            layer = tensor.name.split(".")[1]
            assert np.allclose(np.array(actual[f"model.layers.{layer}.self_attn.v_proj.weight"]), values, atol=1e-6)
        if part == "token_embd":
            assert np.array_equal(np.array(actual["model.embed_tokens.weight"]), values)
    quantised = load(embedded.path(), dense=False, dtype=mx.float32)
    tokens = mx.array([[1, 9690, 198, 2683, 359, 253, 5356, 5646]])
    assert mx.abs(loaded.model(tokens) - quantised.model(tokens)).max().item() <= 1e-2
