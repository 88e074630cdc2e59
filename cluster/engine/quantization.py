"""The name under which vLLM knows checkpoints whose quantised weights MLX computes with.

vLLM verifies a checkpoint's `quantization_config` against its own methods (dtype, device capability, kernels), none of
which apply here: mlx-lm reads the config itself and keeps the weights quantised. `MlxQuantization` claims such
checkpoints first and holds nothing; which of them can really be loaded is the worker's to say (worker/models).
"""

from typing import Any

import torch
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

NAME = "mlx"

CLAIMED_METHODS = frozenset(
    {"", NAME, "affine", "awq", "bitnet", "compressed-tensors", "fp8", "gptq", "modelopt", "mxfp4", "mxfp8", "nvfp4"}
)
"""Values of `quant_method` that mlx-lm has a reading of; mlx-lm's own directories have none at all."""


class MlxQuantization(QuantizationConfig):
    """Placeholder for what vLLM would know of the method; it builds no torch layers, so none is ever asked for."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claims the checkpoint unless the user asked for another method by name."""
        if user_quant in (None, NAME) and hf_quant_cfg.get("quant_method", "") in CLAIMED_METHODS:
            return NAME
        return None

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "MlxQuantization":
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        raise NotImplementedError("MLX checkpoints are not run by torch layers")


def register() -> None:
    """Make the method known to vLLM in this process; calling it again changes nothing."""
    register_quantization_config(NAME)(MlxQuantization)
