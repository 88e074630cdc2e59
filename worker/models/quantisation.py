"""How a checkpoint is quantised, as config.json says, and whether mlx-lm loads it that way.

    config.json (or hf_quant_config.json) --quantisation_of--> Quantisation, None for dense, or a refusal by name

The cases are those of mlx_lm/utils.py, `load_model`, and FP8 with a scale per block, which our own loader makes dense
where mlx-lm's definition does not (fp8.py). GPTQ is refused although it gets through there: mlx-lm unpacks it in
AutoAWQ's order, which is not how GPTQ packs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pomarium.worker.errors import CheckpointError, UnsupportedError

_MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_PACKED_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized", "pack-quantized")
_FP8_DEQUANTISING = {  # mlx-lm's definitions whose `sanitize` turns fp8 blocks into dense weights; for others fp8.py
    "deepseek_v3",
    "deepseek_v32",
    "kimi_k2",
    "joyai_llm_flash",
    "mimo_v2_flash",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl",
    "ministral3",
    "mistral3",
    "mistral4",
}
_CURE = "use a dense checkpoint or one converted by mlx_lm.convert"


@dataclass(frozen=True)
class Quantisation:
    """How weights are stored.

    Attributes:
        method: "mlx" or the foreign scheme. bits: the usual width, where it is known.
        blocks: rows and columns that share a scale, of FP8 weights that our loader makes dense; None if mlx-lm does.
    """

    method: str
    bits: int | None
    blocks: tuple[int, int] | None = None


def quantisation_of(directory: Path, config: Mapping[str, Any], model_type: str) -> Quantisation | None:
    """Raises UnsupportedError naming a scheme that is not loaded, CheckpointError for a malformed entry."""
    own = config.get("quantization")
    if own is not None:
        return _mlx(directory, own)
    foreign = _foreign_entry(directory, config)
    if foreign is None:
        return None
    method = foreign.get("quant_method")
    if method is None and foreign.get("mode", "affine") in _MODES and "bits" in foreign:
        return _mlx(directory, foreign)
    if method is None and "quantization" in foreign:  # hf_quant_config.json, which mlx-lm reads only with a method
        method = foreign.get("producer", {}).get("name", "modelopt")
    if not isinstance(method, str):
        raise CheckpointError(f"{directory}: its quantization_config names no quant_method.")
    bits = foreign.get("bits")
    if not _loads(method, foreign, model_type):
        raise UnsupportedError(f"{directory}: quantisation {_described(method, foreign)} is not supported; {_CURE}.")
    blocks = _blocks(foreign) if method == "fp8" and not _mlx_lm_takes_fp8(foreign, model_type) else None
    return Quantisation(method, bits if isinstance(bits, int) else None, blocks)


def _mlx(directory: Path, entry: Any) -> Quantisation:
    if not isinstance(entry, dict) or not isinstance(entry.get("bits"), int) or "group_size" not in entry:
        raise CheckpointError(f"{directory}: the quantization entry of config.json lacks bits or group_size.")
    mode, bits = entry.get("mode", "affine"), entry["bits"]
    if mode not in _MODES or (mode == "affine" and bits not in _AFFINE_BITS):
        raise UnsupportedError(f"{directory}: MLX has no quantisation {mode!r} with {bits} bits; {_CURE}.")
    return Quantisation("mlx", bits)


def _foreign_entry(directory: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    text = config.get("text_config")
    entry = config.get("quantization_config")
    if entry is None and isinstance(text, dict):
        entry = text.get("quantization_config")
    separate = directory / "hf_quant_config.json"
    if entry is None and separate.is_file():
        try:
            entry = json.loads(separate.read_bytes())
        except ValueError as error:
            raise CheckpointError(f"{separate} is not valid JSON: {error}.") from error
    if entry is not None and not isinstance(entry, dict):
        raise CheckpointError(f"{directory}: its quantization_config is not a JSON object.")
    return entry


def _loads(method: str, entry: Mapping[str, Any], model_type: str) -> bool:
    if method in ("mxfp4", "mxfp8", "bitnet"):
        return True
    if method == "awq":
        return bool(entry.get("bits", 4) == 4 and entry.get("version", "gemm") == "gemm")
    if method == "fp8":
        return _mlx_lm_takes_fp8(entry, model_type) or _blocks(entry) is not None
    if method == "compressed-tensors":
        return entry.get("format") in _PACKED_FORMATS
    if method == "modelopt":
        return bool(entry.get("quantization", entry).get("quant_algo") == "NVFP4")
    return False


def _mlx_lm_takes_fp8(entry: Mapping[str, Any], model_type: str) -> bool:
    """It keeps blocks of 32 x 32 with powers of two for scales as they are, and makes others dense in some models."""
    packed = entry.get("scale_fmt") == "ue8m0" and _blocks(entry) == (32, 32)
    return packed or model_type in _FP8_DEQUANTISING


def _blocks(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    blocks = entry.get("weight_block_size")
    if not isinstance(blocks, list) or len(blocks) != 2 or not all(type(edge) is int and edge > 0 for edge in blocks):
        return None
    return blocks[0], blocks[1]


def _described(method: str, entry: Mapping[str, Any]) -> str:
    details = [str(entry[key]) for key in ("format", "version", "quant_algo") if isinstance(entry.get(key), str)]
    bits = entry.get("bits")
    details += [f"{bits} bits"] if isinstance(bits, int) else []
    return f"{method!r}" + (f" ({', '.join(details)})" if details else "")
