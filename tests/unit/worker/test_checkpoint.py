"""Checkpoints are judged by config.json and headers alone; loading gives dense or quantised models that agree."""

import contextlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny_models import TINY, build, write_checkpoint

from pomarium.worker.errors import CheckpointError, PomariumError, UnsupportedError
from pomarium.worker.models.checkpoint import Checkpoint, inspect, read_safetensors_header, untied
from pomarium.worker.models.load import load
from pomarium.worker.models.quantisation import Quantisation
from pomarium.worker.models.stages import StageCut

TOKENS = mx.array([[5, 9, 44, 3, 77, 8, 120]])


@pytest.fixture(autouse=True)
def _cpu() -> None:
    mx.set_default_device(mx.cpu)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_checkpoint("llama_untied", tmp_path / "model")


def _change(directory: Path, **entries: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **entries}))


def test_facts_of_a_dense_checkpoint(directory: Path) -> None:
    found = inspect(directory)
    size = sum(a.nbytes for _, a in tree_flatten(build("llama_untied").parameters()))
    expected = ("llama", size, "float32", None, (directory / "model.safetensors",))
    assert (found.model_type, found.bytes, found.dtype, found.quantisation, found.files) == expected
    assert isinstance(found, Checkpoint)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _write(name: str, content: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_text(content) and None


def _cut(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _cut_header(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def _index(directory: Path, **weight_map: str) -> None:
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def _sharded(directory: Path) -> None:
    """Into two files, of which only the first is there."""
    first = "model-00001-of-00002.safetensors"
    (directory / "model.safetensors").rename(directory / first)
    _index(directory, **{"model.norm.weight": first, "lm_head.weight": "model-00002-of-00002.safetensors"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), "no config.json"),
        (_write("config.json", "{"), "not valid JSON"),
        (_write("config.json", "[]"), "JSON"),
        (_write("config.json", "[" * 20_000), "not valid JSON"),
        (_write("config.json", "{}"), "no model_type"),
        (_write("config.json", '{"model_type": "../x"}'), "no model_type"),
        (_remove("model.safetensors"), "no model*.safetensors"),
        (_cut, "model.safetensors is truncated"),
        (_cut_header, "model.safetensors is truncated"),
        (_write("model.safetensors", "nonsense and more"), "model.safetensors is truncated or no"),
        (_write("model.safetensors.index.json", "{}"), "not a valid index"),
        (lambda d: _sharded(d), "model-00002-of-00002.safetensors is missing"),
        (lambda d: _index(d, a="model.safetensors", b="model-2.safetensors"), "model-2.safetensors is missing"),
        (_write("model.safetensors.index.json", "[" * 20_000), "not a valid index"),
        (lambda d: _index(d, absent="model.safetensors"), "no shard holds the tensor 'absent'"),
    ],
)
def test_damage_is_named_in_one_sentence(directory: Path, damage: Callable[[Path], None], words: str) -> None:
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        load(directory, dense=False, dtype=None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        inspect(tmp_path / "absent")


@pytest.mark.parametrize("model_type", ["no_such_model", "base"])
def test_unknown_model_types_are_named(directory: Path, model_type: str) -> None:
    _change(directory, model_type=model_type)
    with pytest.raises(UnsupportedError, match=model_type):
        load(directory, dense=False, dtype=None)


def test_model_code_in_the_folder_is_not_run(directory: Path) -> None:
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    _change(directory, model_file="evil.py")
    with pytest.raises(UnsupportedError, match=r"evil\.py"):
        load(directory, dense=False, dtype=None)


def test_weights_that_do_not_fit(directory: Path) -> None:
    _change(directory, hidden_size=64)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(directory, dense=False, dtype=None)
    config = json.loads((directory / "config.json").read_text())
    del config["intermediate_size"]
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="intermediate_size"):
        load(directory, dense=False, dtype=None)


@pytest.mark.parametrize(
    ("entries", "answer"),
    [
        ({"quantization": {"group_size": 64, "bits": 4}}, Quantisation("mlx", 4)),
        ({"quantization_config": {"group_size": 64, "bits": 8}}, Quantisation("mlx", 8)),
        ({"quantization_config": {"quant_method": "mxfp4"}}, Quantisation("mxfp4", None)),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemm"}}, Quantisation("awq", 4)),
        ({"quantization": {"group_size": 64, "bits": 7}}, "7 bits"),
        ({"quantization": {"group_size": 64}}, "lacks bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 8}}, "'awq' \\(8 bits\\)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq' \\(4 bits\\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "'fp8'"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}}, "'fp8'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 64]}},
            Quantisation("fp8", None, (128, 64)),
        ),
        (
            {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 32]}},
            Quantisation("fp8", None),
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "'bitsandbytes'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
            "'compressed-tensors' \\(float-quantized\\)",
        ),
        ({"quantization_config": {}}, "names no quant_method"),
        ({"quantization_config": "awq"}, "not a JSON object"),
    ],
)
def test_quantisation(directory: Path, entries: dict[str, Any], answer: Quantisation | str) -> None:
    _change(directory, **entries)
    if isinstance(answer, Quantisation):
        assert inspect(directory).quantisation == answer
    else:
        with pytest.raises((UnsupportedError, CheckpointError), match=answer):
            inspect(directory)


def _safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


@given(
    st.one_of(
        st.binary(max_size=200),
        st.builds(_safetensors, st.binary(max_size=100), st.binary(max_size=50)),
        st.builds(
            lambda shape, offsets, dtype: _safetensors(
                json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode(), b"\0" * 64
            ),
            st.lists(st.integers(-2, 9), max_size=3),
            st.lists(st.integers(-5, 2**65), min_size=1, max_size=3),
            st.sampled_from(["F32", "BF16", "X"]),
        ),
    )
)
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_safetensors_header(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):  # any other exception fails the test
        for dtype, nbytes in read_safetensors_header(file).values():
            assert dtype in ("F32", "BF16")
            assert 0 <= nbytes <= len(content)


def _quantised(name: str, directory: Path, bits: int, mode: str, group_size: int) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    sizes |= {"moe_intermediate_size": 64} if "moe" in name else {}
    write_checkpoint(name, directory, **sizes)
    model = build(name, **sizes)
    nn.quantize(
        model,
        group_size,
        bits,
        mode=mode,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and not path.endswith("gate"),
    )
    mx.save_safetensors(str(directory / "model.safetensors"), dict(tree_flatten(model.parameters())))
    _change(directory, quantization={"group_size": group_size, "bits": bits, "mode": mode})
    return model


@pytest.mark.parametrize(
    ("name", "bits", "mode", "group_size"),
    [("llama_untied", 4, "affine", 64), ("qwen2", 8, "affine", 32), ("qwen3_moe", 4, "mxfp4", 32)],
)
def test_dense_and_quantised_agree(name: str, bits: int, mode: str, group_size: int, tmp_path: Path) -> None:
    original = _quantised(name, tmp_path, bits, mode, group_size)
    dense = load(tmp_path, dense=True, dtype=mx.float32)
    quantised = load(tmp_path, dense=False, dtype=mx.float32)
    expected = original(TOKENS)
    assert mx.abs(quantised.model(TOKENS) - expected).max().item() <= 1e-4
    assert mx.abs(dense.model(TOKENS) - expected).max().item() <= 1e-4
    kinds = {type(layer).__name__ for _, layer in dense.model.named_modules()}
    assert not any("Quantized" in kind for kind in kinds)
    assert any("Quantized" in type(layer).__name__ for _, layer in quantised.model.named_modules())
    assert dense.weight_bytes > 2 * quantised.weight_bytes


@pytest.mark.parametrize("nested", [False, True])
def test_a_head_beside_a_config_that_does_not_say_so_is_used(directory: Path, nested: bool) -> None:
    """mlx-lm takes a llama without `tie_word_embeddings` for tied, and drops the head."""
    want = load(directory, dense=False, dtype=None).model(TOKENS)
    config = json.loads((directory / "config.json").read_text())
    assert config.pop("tie_word_embeddings") is False
    if nested:
        assert untied({"text_config": config}, {"language_model.lm_head.weight"})["text_config"] == {
            **config, "tie_word_embeddings": False
        }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    assert mx.array_equal(load(directory, dense=False, dtype=None).model(TOKENS), want)


def test_a_config_without_a_head_stays_as_it_is() -> None:
    config = {"model_type": "llama", "text_config": {}}
    assert untied(config, {"model.embed_tokens.weight"}) is config
    assert untied({**config, "tie_word_embeddings": True}, {"lm_head.weight"})["tie_word_embeddings"]


def test_casting(directory: Path) -> None:
    for dtype in (mx.float16, mx.bfloat16, mx.float32):
        loaded = load(directory, dense=False, dtype=dtype)
        assert {a.dtype for _, a in tree_flatten(loaded.model.parameters())} == {dtype}
    assert load(directory, dense=False, dtype=None).weight_bytes == inspect(directory).bytes


def test_dequantising_holds_one_layer_at_a_time(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 10, "head_dim": 32}
    write_checkpoint("llama_untied", tmp_path, **sizes)
    model = build("llama_untied", **sizes)
    nn.quantize(model, 32, 8)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    _change(tmp_path, quantization={"group_size": 32, "bits": 8})
    stored = inspect(tmp_path).bytes
    del model
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load(tmp_path, dense=True, dtype=mx.float32)
    excess = mx.get_peak_memory() - before - loaded.weight_bytes
    assert excess < stored / 4


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "mistral_sliding"])
def test_a_tiny_checkpoint_of_a_family_loads_as_built(name: str, tmp_path: Path) -> None:
    write_checkpoint(name, tmp_path)
    assert TINY[name]["model_type"] == inspect(tmp_path).model_type
    assert mx.array_equal(load(tmp_path, dense=True, dtype=mx.float32).model(TOKENS), build(name)(TOKENS))


def test_a_whole_model_beside_the_index_of_other_files_is_whole(directory: Path) -> None:
    _index(
        directory,
        **{"model.norm.weight": "model-00001-of-00002.safetensors", "gone": "model-00002-of-00002.safetensors"},
    )
    assert inspect(directory).files == (directory / "model.safetensors",)
    assert mx.array_equal(load(directory, dense=True, dtype=mx.float32).model(TOKENS), build("llama_untied")(TOKENS))


@pytest.mark.parametrize(
    "name",
    [
        "a[1]b",
        "[ ]",
        "x*y",
        "what?",
        "[!a]",
        "with space",
        "modèle-模型-🍎",
        "two\nlines",
        "a\\b",
        "'quote\"",
        "%25",
        "-x",
    ],
)
def test_a_folder_has_any_name(directory: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = build("llama_untied")(TOKENS)
    folder = directory.rename(directory.with_name(name))
    assert inspect(folder).path == folder
    for cut in (None, StageCut(0, 1, inspect(folder).config["num_hidden_layers"])):
        loaded = load(folder, dense=True, dtype=mx.float32, cut=cut)
        if cut is None:
            assert mx.array_equal(loaded.model(TOKENS), expected)
    monkeypatch.chdir(folder.parent)
    assert mx.array_equal(load(Path(name), dense=True, dtype=mx.float32).model(TOKENS), expected)


def test_scratch_folders_of_any_name_do_too(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "[tmp]"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    folder = directory.rename(directory.with_name("[model]"))
    assert mx.array_equal(load(folder, dense=True, dtype=mx.float32).model(TOKENS), build("llama_untied")(TOKENS))


def test_what_does_not_fit_names_its_parameters(directory: Path) -> None:
    file = directory / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    mx.save_safetensors(str(file), tensors)
    with pytest.raises(CheckpointError, match=r"Missing 1 parameters: model\.layers\.1\.mlp\.up_proj\.weight\.$"):
        load(directory, dense=True, dtype=None)
    mx.save_safetensors(str(file), {f"{name}.x": tensor for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=r"parameters not in model: .*\.weight\.x") as caught:
        load(directory, dense=True, dtype=None)
    assert len(str(caught.value)) < 700 + len(str(directory))


def test_errors_are_reported_as_one_line() -> None:
    assert issubclass(CheckpointError, PomariumError)
    assert issubclass(UnsupportedError, PomariumError)
