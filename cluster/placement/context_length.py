"""--max-model-len against the model's own context, from its config.json and before anything is started.

config.json --read, longest--> tokens --require--> SettingsError      vLLM's refusal --reworded--> the same sentence
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pomarium.worker.errors import SettingsError

LONG_VARIABLE = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""vLLM's: it takes more than the model was made for."""

KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
    "max_sequence_length", "max_seq_length", "seq_len",
)  # fmt: skip
"""What vLLM reads a context from (vllm/transformers_utils/model_arch_config_convertor.py)."""

VLLM_SAYS = re.compile(
    r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len \((?:\w+\.)?(\w+)=([\d.]+)"
)


def longest(config: Mapping[str, Any]) -> int | None:
    """Tokens that `config` (config.json) admits at most, whatever vLLM makes of its RoPE; None if it does not say."""
    text = config.get("text_config")
    inner: Mapping[str, Any] = text if isinstance(text, dict) else {}
    lengths = [_number(layer.get(key)) for layer in (config, inner) for key in KEYS]
    ropes = [*_ropes(config), *_ropes(inner)]
    lengths += [_number(rope.get("original_max_position_embeddings")) for rope in ropes]
    factor = max([1.0, *(_number(rope.get("factor")) for rope in ropes)])
    return int(max(lengths) * factor) or None


def read(config: Path) -> int | None:
    """`longest` of a config.json. None as well for one that cannot be read: who loads the model says that better."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return longest(found) if isinstance(found, dict) else None


def require(model: str, tokens: int, limit: int | None, environ: Mapping[str, str]) -> None:
    """Raises SettingsError if `tokens` are more than `limit`, which `model` can take."""
    if limit is not None and tokens > limit and environ.get(LONG_VARIABLE, "0") in ("", "0"):
        raise SettingsError(f"{model}: {sentence(tokens, limit)}")


def sentence(tokens: int, limit: int) -> str:
    """What is wrong, and what to change."""
    return (
        f"--max-model-len {tokens} is more than the {limit} tokens that the model was made for: give at most {limit}."
    )


def reworded(text: str) -> str:
    """`text`, or our sentence if it is vLLM's refusal of a context that is too long."""
    found = VLLM_SAYS.search(text)
    return text if found is None else sentence(int(found[1]), int(float(found[3])))


def _ropes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The RoPE parameters of all layer types."""
    found = [one for one in (config.get("rope_scaling"), config.get("rope_parameters")) if isinstance(one, dict)]
    return [*found, *(inner for one in found for inner in one.values() if isinstance(inner, dict))]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
