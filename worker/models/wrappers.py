"""Multimodal checkpoints that are served as text models: the compatibility allowlist, and the check that there is text.

    architecture in config.json --WRAPPERS--> TextWrapper --cluster.model_registry--> vLLM sees a text model
    names of tensors            --check_text_model--> the text model is there, or one sentence

For these types mlx-lm's definitions build the model of `text_config` and drop the tensors of vision and audio towers in
their `sanitize`; as files are read lazily, those are never read. VLLM_METAL_MULTIMODAL_MODE chooses whether that is
wanted. An entry belongs here once the parity tests (tests/parity/test_wrappers.py) cover it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pomarium.worker.errors import CheckpointError

TEXT_PREFIXES = ("model.language_model.", "language_model.")
"""What the names of a text model's tensors begin with, as Hugging Face and as mlx-lm write them."""


@dataclass(frozen=True)
class TextWrapper:
    """Attributes: model_type: of config.json, around `text_config`. hybrid: the text model has gated-delta layers."""

    model_type: str
    hybrid: bool


WRAPPERS: Mapping[str, TextWrapper] = MappingProxyType({
    "Gemma4ForConditionalGeneration": TextWrapper("gemma4", hybrid=False),
    "Qwen3_5ForConditionalGeneration": TextWrapper("qwen3_5", hybrid=True),
    "Qwen3_5MoeForConditionalGeneration": TextWrapper("qwen3_5_moe", hybrid=True),
})  # fmt: skip
"""The allowlist: architecture -> what is served of it. Qwen3.6 names the architectures of Qwen3.5."""

_MODEL_TYPES = frozenset(wrapper.model_type for wrapper in WRAPPERS.values())


def check_text_model(directory: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises CheckpointError if the config is a wrapper's and none of the tensors `names` is of its text model."""
    if config.get("model_type") not in _MODEL_TYPES or "text_config" not in config:
        return
    if not isinstance(config["text_config"], dict):
        raise CheckpointError(f"{directory / 'config.json'}: its text_config is not a JSON object.")
    if not any(name.startswith(TEXT_PREFIXES) for name in names):
        raise CheckpointError(
            f"{directory} holds no text model: no tensor's name begins with {' or '.join(TEXT_PREFIXES)}; "
            "use the complete checkpoint."
        )
