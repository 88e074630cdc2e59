"""The stand-in tells vLLM what vLLM's own classes of the proven families would, and spares their inspection."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from tiny_models import write_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models import registry
from vllm.model_executor.models.registry import _VLLM_MODELS, ModelRegistry, _ModelInfo

from pomarium.cluster.model_registry import ARCHITECTURES, MlxDecoder
from pomarium.worker.models.verify import PROVEN

UNKNOWN_TO_TRANSFORMERS = {
    "internlm3": "InternLM3ForCausalLM",
    "mimo": "MiMoForCausalLM",
    "minicpm3": "MiniCPM3ForCausalLM",
    "youtu_llm": "YoutuForCausalLM",
}


def test_the_proven_families_are_registered_and_no_others() -> None:
    assert {UNKNOWN_TO_TRANSFORMERS.get(family) or NAMES[family] for family in PROVEN} == ARCHITECTURES


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES & set(_VLLM_MODELS)))
def test_the_stand_in_answers_like_vllms_own_class(architecture: str) -> None:
    module, name = _VLLM_MODELS[architecture]
    theirs = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    ours = _ModelInfo.from_model_cls(MlxDecoder)
    assert replace(ours, architecture=name) == _ModelInfo.from_model_cls(theirs)


def test_a_configuration_is_made_without_an_inspection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(inspection: object) -> NoReturn:
        raise AssertionError("vLLM inspects a model in a process of its own")

    monkeypatch.setattr(registry, "_run_in_subprocess", no_process)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    config = EngineArgs(str(write_checkpoint("llama", tmp_path / "model")), skip_tokenizer_init=True)
    model = config.create_engine_config().model_config
    assert model.architecture == "LlamaForCausalLM"
    assert (model.runner_type, model.is_multimodal_model, model.has_inner_state) == ("generate", False, False)


def test_other_architectures_stay_vllms() -> None:
    from vllm.platforms import current_platform

    current_platform.pre_register_and_update()
    for architecture in ("MambaForCausalLM", "BertModel", "Qwen2VLForConditionalGeneration", "LlamaModel"):
        assert not isinstance(ModelRegistry.models[architecture], registry._RegisteredModel)
