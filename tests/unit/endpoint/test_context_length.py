"""--max-model-len beyond what a model was made for: our sentence, before a start, and never for what vLLM takes."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import TINY

from pomarium.cluster import faults
from pomarium.cluster.endpoint import beforehand
from pomarium.cluster.placement import context_length
from pomarium.cluster.replica.serve_plan import ModelPlan
from pomarium.worker.errors import SettingsError
from pomarium.worker.models.resolve import resolve

FORMS = ["llama", "llama3_rope", "phi3_longrope", "deepseek_v2_lite", "gemma3_text", "apertus"]
"""Of configurations: plain, Llama 3's RoPE, a long one, YaRN, one for each layer type, the form of transformers 5."""


def written(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def asked(source: str | None, tokens: Any, **environ: str) -> None:
    beforehand.check([ModelPlan("m", source, {"max_model_len": tokens})], environ)


def test_more_than_the_model_was_made_for_is_refused(tmp_path: Path) -> None:
    folder = str(written(tmp_path, {"max_position_embeddings": 2048}))
    with pytest.raises(SettingsError) as caught:
        asked(folder, 2049)
    assert str(caught.value) == (
        f"{folder}: --max-model-len 2049 is more than the 2048 tokens that the model was made for: give at most 2048."
    )
    asked(folder, 2048)
    asked(folder, 2049, VLLM_ALLOW_LONG_MAX_MODEL_LEN="1")
    asked(folder, -1)  # vLLM's word for as many as fit


def test_the_embedded_model_s_context_is_its_own() -> None:
    assert context_length.read(resolve(None) / "config.json") == beforehand.EMBEDDED_CONTEXT
    with pytest.raises(SettingsError, match="give at most 8192"):
        asked(None, 8193)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"max_position_embeddings": null}'])
def test_a_configuration_that_says_nothing_refuses_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    asked(str(tmp_path), 10**9)


@pytest.mark.parametrize("name", FORMS)
def test_what_vllm_derives_is_never_refused(name: str, tmp_path: Path) -> None:
    """vLLM's own derivation (vllm/config/model.py, _get_and_verify_max_len)."""
    derived = vllm_s(written(tmp_path, TINY[name]), None)
    limit = context_length.longest(TINY[name])
    assert limit is None or limit >= derived


def test_vllm_s_refusal_is_told_in_our_words(tmp_path: Path) -> None:
    folder = written(tmp_path, {**TINY["llama"], "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **LLAMA3}})
    with pytest.raises(ValueError, match="CUDA") as caught:
        vllm_s(folder, 2000)
    assert faults.sentence(caught.value) == (
        "--max-model-len 2000 is more than the 512 tokens that the model was made for: give at most 512."
    )


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def vllm_s(folder: Path, tokens: int | None) -> int:
    from vllm.config import ModelConfig

    return int(ModelConfig(str(folder), max_model_len=tokens, skip_tokenizer_init=True).max_model_len)
