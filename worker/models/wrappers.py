"""Multimodal checkpoints that are served as text models: the compatibility allowlist, and the check that there is text.

    architecture in config.json --WRAPPERS--> TextWrapper --cluster.model_registry--> vLLM sees a text model
    names of tensors            --check_text_model--> the text model is there, or one sentence

For these types mlx-lm's definitions build the model of `text_config` and drop the tensors of vision and audio towers in
their `sanitize`; as files are read lazily, those are never read. VLLM_METAL_MULTIMODAL_MODE chooses whether that is
wanted. An entry belongs here once the parity tests (tests/parity/test_wrappers.py) cover it.

mlx-lm has no definition of Idefics3 and SmolVLM, whose text model is a plain decoder of another family. Their config is
lifted: text_config with what stands beside it, so that everything behind sees the decoder, and their tensors lose the
names around it. Whether the tower is loaded beside it is no matter of this (worker/vision).

    config.json --lifted--> the decoder's, with WRAPPED_IN     tensors --text_tensors--> the decoder's
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pomarium.worker.errors import CheckpointError, UnsupportedError

TEXT_PREFIXES = ("model.language_model.", "language_model.", "model.text_model.")
"""What the names of a text model's tensors begin with, as Hugging Face and as mlx-lm write them."""
WRAPPED_IN = "wrapped_in"
"""Key of a lifted config: the model type around it."""
_HEAD = "lm_head."


@dataclass(frozen=True)
class TextWrapper:
    """A wrapper's facts.

    Attributes:
        model_type: of config.json, around `text_config`.
        hybrid: the text model has gated-delta layers.
        decoders: model types of `text_config` that are lifted; none: mlx-lm defines the wrapper itself.
    """

    model_type: str
    hybrid: bool
    decoders: tuple[str, ...] = ()


WRAPPERS: Mapping[str, TextWrapper] = MappingProxyType({
    "Gemma4ForConditionalGeneration": TextWrapper("gemma4", hybrid=False),
    "Qwen3_5ForConditionalGeneration": TextWrapper("qwen3_5", hybrid=True),
    "Qwen3_5MoeForConditionalGeneration": TextWrapper("qwen3_5_moe", hybrid=True),
    "Idefics3ForConditionalGeneration": TextWrapper("idefics3", hybrid=False, decoders=("llama",)),
    "SmolVLMForConditionalGeneration": TextWrapper("smolvlm", hybrid=False, decoders=("llama",)),
})  # fmt: skip
"""The allowlist: architecture -> what is served of it. Qwen3.6 names the architectures of Qwen3.5."""

_MODEL_TYPES = frozenset(wrapper.model_type for wrapper in WRAPPERS.values())


def check_text_model(directory: Path, config: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raises CheckpointError if the config is a wrapper's and none of the tensors `names` is of its text model."""
    kind = config.get(WRAPPED_IN, config.get("model_type"))
    if kind not in _MODEL_TYPES or "text_config" not in config:
        return
    if not isinstance(config["text_config"], dict):
        raise CheckpointError(f"{directory / 'config.json'}: its text_config is not a JSON object.")
    if not any(name.startswith(TEXT_PREFIXES) for name in names):
        raise CheckpointError(
            f"{directory} holds no text model: no tensor's name begins with {' or '.join(TEXT_PREFIXES)}; "
            "use the complete checkpoint."
        )


def lifted(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the decoder that `config` wraps, with what stands around it; `config` where nothing is lifted.

    Raises:
        CheckpointError: its text_config is none.
        UnsupportedError: the decoder is of a family that was not tested within a wrapper.
    """
    kind = config.get("model_type")
    wrapper = next((wrapper for wrapper in WRAPPERS.values() if wrapper.model_type == kind), None)
    if wrapper is None or not wrapper.decoders or "text_config" not in config:
        return dict(config)
    text = config["text_config"]
    if not isinstance(text, dict):
        raise CheckpointError(f"{directory / 'config.json'}: its text_config is not a JSON object.")
    decoder = text.get("model_type")
    if decoder not in wrapper.decoders:
        raise UnsupportedError(
            f"{directory}: a {kind} model around {decoder!r} is not served, only one around "
            f"{' or '.join(wrapper.decoders)}; use another model."
        )
    tied = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
    return {**config, **text, **tied, WRAPPED_IN: kind}


def text_tensors(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a lifted decoder under its own names; those of the tower are left out."""
    found = {}
    for name, array in weights.items():
        prefix = next((prefix for prefix in TEXT_PREFIXES if name.startswith(prefix)), None)
        if name.startswith(_HEAD):
            found[name] = array
        elif prefix is not None:
            own = name.removeprefix(prefix)
            found[own if own.startswith(_HEAD) else f"model.{own}"] = array
    return found
