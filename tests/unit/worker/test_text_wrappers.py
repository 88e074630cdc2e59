"""Bad input in wrappers' directories, and their configs in the form that mlx-lm reads."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from wrapper_models import Damage, write_wrapper

from pomarium.worker.errors import CheckpointError, UnsupportedError
from pomarium.worker.models.checkpoint import inspect
from pomarium.worker.models.forms.completion import completed
from pomarium.worker.models.load import load
from pomarium.worker.models.wrappers import TEXT_PREFIXES

HERE = Path("here")
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
Q_PROJ = "model.language_model.layers.2.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", ["gemma4_small", "qwen3_5"])
def test_towers_without_a_text_model(name: str, tmp_path: Path) -> None:
    """Found from the headers, before anything is read."""
    write_wrapper(name, tmp_path / "whole")
    whole = mx.load(str(tmp_path / "whole" / "model.safetensors"))
    write_wrapper(name, tmp_path, damage={key: lambda value: None for key in whole if key.startswith(TEXT_PREFIXES)})
    with pytest.raises(CheckpointError, match=r"holds no text model: .*model\.language_model\."):
        inspect(tmp_path)


def test_a_text_config_that_is_none(tmp_path: Path) -> None:
    config = write_wrapper("qwen3_5", tmp_path) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "text_config": "qwen"}))
    with pytest.raises(CheckpointError, match="text_config is not a JSON object"):
        inspect(tmp_path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        ({f"{Q_PROJ}_scale_inv": lambda scales: None}, "has no scales"),
        ({f"{Q_PROJ}_scale_inv": lambda scales: scales[:1]}, "have shape"),
        ({Q_PROJ: lambda codes: None}, "have no weight"),
        ({f"{Q_PROJ}_scale_inv": lambda scales: scales * np.inf}, "scales are damaged"),
        ({Q_PROJ: lambda codes: codes | 127}, "scales are damaged"),
        ({"model.language_model.norm.weight": lambda weight: None}, "does not fit mlx-lm's qwen3_5 model"),
    ],
)
def test_damaged_fp8_is_one_error(damage: Damage, problem: str, tmp_path: Path) -> None:
    write_wrapper("qwen3_5", tmp_path, (16, 16), damage)
    with pytest.raises(CheckpointError, match=problem):
        load(tmp_path, dense=True, dtype=mx.float32)


@pytest.mark.parametrize(
    ("config", "added"),
    [
        ({"model_type": "llama", "text_config": {"layer_types": [FULL]}}, {}),
        ({"model_type": "qwen3_5", "layer_types": [LINEAR, FULL] * 2}, {"full_attention_interval": 2}),
        ({"model_type": "qwen3_5", "layer_types": [FULL], "full_attention_interval": 4}, {}),
        ({"model_type": "qwen3_5_moe", "layer_types": [LINEAR]}, {}),
        ({"model_type": "gemma4_text", "layer_types": [SLIDING, FULL], "global_head_dim": 512}, {}),
        (
            {
                "model_type": "gemma4_text",
                "layer_types": [SLIDING, FULL],
                "per_layer_config": {"1": {"head_dim": 512, "num_key_value_heads": 2}},
            },
            {"global_head_dim": 512, "num_global_key_value_heads": 2},
        ),
        (
            {"model_type": "gemma4_text", "head_dim": 64, "layer_types": [SLIDING, FULL], "per_layer_config": {}},
            {"global_head_dim": 64},
        ),
    ],
)
def test_configs_are_completed(config: dict[str, Any], added: dict[str, Any]) -> None:
    assert completed(HERE, config) == {**config, **added}


def test_a_wrapper_s_vocabulary_is_that_of_its_text() -> None:
    config = {"model_type": "gemma4", "text_config": {"vocab_size": 7}}
    assert completed(HERE, config) == {**config, "vocab_size": 7}
    assert completed(HERE, {**config, "vocab_size": 9})["vocab_size"] == 9
    qwen = {"model_type": "qwen3_5", "text_config": {"vocab_size": 7, "layer_types": [LINEAR, FULL]}}
    assert completed(HERE, qwen)["text_config"]["full_attention_interval"] == 2


@pytest.mark.parametrize(
    "text",
    [
        {"model_type": "qwen3_5", "layer_types": [LINEAR, FULL, FULL]},
        {"model_type": "gemma4_text", "layer_types": [FULL, FULL], "per_layer_config": {"1": {"head_dim": 8}}},
        {"model_type": "gemma4_text", "layer_types": [FULL], "per_layer_config": {"0": {"sliding_window": 8}}},
        {
            "model_type": "gemma4_text",
            "layer_types": [FULL, FULL],
            "per_layer_config": {"0": {"head_dim": 8}, "1": {"head_dim": 4}},
        },
    ],
)
def test_layers_that_mlx_lm_has_no_form_for(text: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=r"^here: its .*mlx-lm has no form for; use a released"):
        completed(HERE, text)
