"""The stand-in tells vLLM what vLLM's own classes of the proven families would, and spares their inspection."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_models import VOCAB_SIZE, write_checkpoint
from transformers import Qwen2VLConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry, _ModelInfo
from wrapper_models import WRAPPED, write_wrapper

from pomarium.cluster.engine.model_registry import ARCHITECTURES, MlxDecoder
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.verify import PROVEN
from pomarium.worker.models.wrappers import WRAPPERS
from pomarium.worker.settings import MultimodalMode

UNKNOWN_TO_TRANSFORMERS = {
    "internlm3": "InternLM3ForCausalLM",
    "mimo": "MiMoForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "youtu_llm": "YoutuForCausalLM",
}


def test_the_proven_families_are_registered_and_no_others() -> None:
    proven = {UNKNOWN_TO_TRANSFORMERS.get(family) or NAMES[family] for family in PROVEN}
    assert proven - WRAPPERS.keys() == ARCHITECTURES


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES & set(_VLLM_MODELS)))
def test_the_stand_in_answers_like_vllms_own_class(architecture: str) -> None:
    module, name = _VLLM_MODELS[architecture]
    theirs = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    ours = _ModelInfo.from_model_cls(MlxDecoder)
    assert replace(ours, architecture=name) == _ModelInfo.from_model_cls(theirs)


def no_process(inspection: object) -> NoReturn:
    raise AssertionError("vLLM inspects a model in a process of its own")


def test_a_configuration_is_made_without_an_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_run_in_subprocess", no_process)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    config = EngineArgs(str(write_checkpoint("llama", tmp_path / "model")), skip_tokenizer_init=True)
    model = config.create_engine_config().model_config
    assert model.architecture == "LlamaForCausalLM"
    assert (model.runner_type, model.is_multimodal_model, model.has_inner_state) == ("generate", False, False)


@pytest.mark.parametrize("name", ["gemma4_small", "gemma4_dense", "qwen3_5", "qwen3_5_moe"])
def test_wrappers_on_the_allowlist_are_text_models(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an inspection, and with what vLLM has to know of their layers."""
    monkeypatch.setattr(registry, "_run_in_subprocess", no_process)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    config = EngineArgs(str(write_wrapper(name, tmp_path / "model")), skip_tokenizer_init=True).create_engine_config()
    model, wrapper = config.model_config, WRAPPERS[WRAPPED[name].architecture]
    assert model.architecture == WRAPPED[name].architecture
    assert (model.runner_type, model.is_multimodal_model) == ("generate", False)
    assert (model.is_hybrid, model.has_inner_state) == (wrapper.hybrid, wrapper.hybrid)
    assert model.get_vocab_size() == VOCAB_SIZE
    assert config.attention_config.backend is None


@pytest.mark.parametrize("mode", MultimodalMode)
def test_other_multimodal_models_are_refused_without_an_inspection(
    mode: MultimodalMode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would need torchvision, and half a minute."""
    monkeypatch.setattr(registry, "_run_in_subprocess", no_process)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    monkeypatch.setenv("VLLM_METAL_MULTIMODAL_MODE", mode.value)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen2VLConfig(text_config=sizes, architectures=["Qwen2VLForConditionalGeneration"])
    config.save_pretrained(tmp_path / "model")
    native = mode is MultimodalMode.NATIVE
    refusal = "only, not for Qwen2VL" if native else r"not on the allowlist .*Gemma4.*serve one of these"
    with pytest.raises(UnsupportedError, match=refusal):
        EngineArgs(str(tmp_path / "model"), skip_tokenizer_init=True).create_engine_config()


def test_other_architectures_stay_vllms() -> None:
    from vllm.platforms import current_platform

    current_platform.pre_register_and_update()
    for architecture in ("MambaForCausalLM", "BertModel", "JambaForCausalLM", "LlamaModel"):
        assert not isinstance(ModelRegistry.models[architecture], registry._RegisteredModel)
