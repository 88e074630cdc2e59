"""What mlx-lm's definitions compute otherwise than transformers', put right on the built model, before it gets weights.

    model, config --mend--> the same model: windows (windows.py), the rotated part of a head, scaled rotations, exact
                            YaRN, LongRoPE, activations, epsilons, and how experts are selected (routing.py)

Each is a difference that no key of config.json can express to mlx-lm. Sources: transformers/modeling_rope_utils.py and
the families' modeling_*.py.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import deepseek_v32, falcon_h1, gemma, glm4_moe_lite, gpt_bigcode, gpt_neox, starcoder2
from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE, initialize_rope

from pomarium.worker.models.forms.families import FAMILIES
from pomarium.worker.models.forms.family import Config, Family
from pomarium.worker.models.forms.routing import REROUTED, add_selection_bias
from pomarium.worker.models.forms.window_layers import keep_windows
from pomarium.worker.models.forms.windows import layer_windows


class GemmaMLP(gemma.MLP):
    """Gemma's MLP with the approximate GELU that it was trained with (mlx_lm/models/gemma.py has the exact one)."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        out: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return out


class ExactGPTNeoXMLP(gpt_neox.MLP):
    """GPT-NeoX's MLP with the exact GELU (mlx_lm/models/gpt_neox.py approximates it, whatever hidden_act says)."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        out: mx.array = self.dense_4h_to_h(nn.gelu(self.dense_h_to_4h(x)))
        return out


class GPTBigCodeMLP(gpt_bigcode.MLP):
    """StarCoder's MLP, likewise."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        out: mx.array = self.c_proj(nn.gelu_approx(self.c_fc(x)))
        return out


class Starcoder2MLP(starcoder2.MLP):
    """StarCoder 2's MLP, likewise."""

    def __call__(self, x: mx.array) -> mx.array:
        """x: (..., hidden); the same shape out."""
        out: mx.array = self.c_proj(nn.gelu_approx(self.c_fc(x)))
        return out


_SAME_PARAMETERS: Mapping[type[nn.Module], type[nn.Module]] = MappingProxyType(
    {
        gemma.MLP: GemmaMLP,
        gpt_bigcode.MLP: GPTBigCodeMLP,
        starcoder2.MLP: Starcoder2MLP,
        **REROUTED,
    }
)


def mend(model: nn.Module, config: Config, longest: int | None = None) -> None:
    """Change `model`, built by mlx-lm of `config` (mlx-lm's form), in place.

    Args:
        longest: the longest context that is served, in tokens, which chooses between LongRoPE's factors; None for any.
    """
    model_type = str(config.get("model_type"))
    family = FAMILIES.get(model_type, Family())
    if windows := layer_windows(config, model_type):
        keep_windows(model, windows)
    for module in model.modules():
        if (other := _SAME_PARAMETERS.get(type(module))) is not None:
            module.__class__ = other
    add_selection_bias(model)
    if (own := _OWN.get(model_type)) is not None:
        own(model, config)
    scaling = config.get("rope_scaling")
    if isinstance(scaling, Mapping):
        if family.rope.rescaled:
            _rescale(model, config, scaling)
        _mend_scaling(model, float(config[family.rope.theta or "rope_theta"]), scaling, longest)


def _rescale(model: nn.Module, config: Config, scaling: Mapping[str, Any]) -> None:
    """Put scaled rotations in the place of nn.RoPE."""
    for module in model.modules():
        for name, child in module.children().items():
            if type(child) is nn.RoPE:
                length = config.get("max_position_embeddings")
                module[name] = initialize_rope(child.dims, child.base, child.traditional, dict(scaling), length)


def _mend_scaling(model: nn.Module, base: float, scaling: Mapping[str, Any], longest: int | None) -> None:
    for module in model.modules():
        if type(module) is YarnRoPE and scaling.get("truncate") is False:
            module._freqs = exact_yarn(module.dims, base, scaling)
        elif type(module) is SuScaledRoPE:
            _mend_longrope(module, base, scaling, longest)


def _mend_longrope(rope: SuScaledRoPE, base: float, scaling: Mapping[str, Any], longest: int | None) -> None:
    """The short factors where no context is longer than the original one; mlx-lm always takes the long ones.

    transformers changes all rotations when a text outgrows that length, which cached keys do not allow; vLLM chooses
    by the longest context, too (vllm/model_executor/layers/rotary_embedding/phi3_long_rope_scaled_rope.py).
    """
    if (factor := _longrope_factor(scaling)) is not None:
        rope._scale = factor
    if longest is not None and longest <= scaling["original_max_position_embeddings"]:
        wavelengths = base ** (mx.arange(0, rope.dim, 2, dtype=mx.float32) / rope.dim)
        rope._freqs = mx.array(scaling["short_factor"], dtype=mx.float32) * wavelengths
        rope._scale = scaling.get("short_mscale") or rope._scale


def _rotate_part(model: nn.Module, config: Config) -> None:
    """GLM-4 rotates the first part of each head (mlx_lm/models/glm.py rotates all of it)."""
    fraction = float(config.get("partial_rotary_factor") or 0.5)
    for module in model.modules():
        if type(module) is nn.RoPE:
            module.dims = int(module.dims * fraction)


def _multiply_keys(model: nn.Module, config: Config) -> None:
    """Falcon-H1 multiplies keys (mlx_lm/models/falcon_h1.py looks for a projection of another name)."""
    for module in model.modules():
        if type(module) is falcon_h1.FalconH1Attention:
            module.scale *= float(config.get("key_multiplier", 1.0))


def _latent_norms(model: nn.Module, config: Config) -> None:
    """GLM-4 MoE Lite's norms of latents have an epsilon of their own, which mlx_lm/models/glm4_moe_lite.py shares."""
    for module in model.modules():
        if type(module) is glm4_moe_lite.Glm4MoeLiteAttention:
            for name in ("q_a_layernorm", "kv_a_layernorm"):
                if name in module:
                    module[name].eps = 1e-6


def _indexer_norms(model: nn.Module, config: Config) -> None:
    """The indexer's norm of keys has another epsilon than mlx's default, which mlx_lm/models/deepseek_v32.py takes."""
    for module in model.modules():
        if type(module) is deepseek_v32.Indexer:
            module.k_norm.eps = 1e-6


def _exact_gelu(model: nn.Module, config: Config) -> None:
    for module in model.modules():
        if type(module) is gpt_neox.MLP and config.get("hidden_act", "gelu") == "gelu":
            module.__class__ = ExactGPTNeoXMLP


_OWN: Mapping[str, Callable[[nn.Module, Config], None]] = MappingProxyType(
    {
        "gpt_neox": _exact_gelu,
        "deepseek_v32": _indexer_norms,
        "glm4_moe_lite": _latent_norms,
        "glm_moe_dsa": _indexer_norms,
        "falcon_h1": _multiply_keys,
        "glm": _rotate_part,
    }
)


def exact_yarn(dims: int, base: float, scaling: Mapping[str, Any]) -> mx.array:
    """Wavelengths over 2 pi, float32 (dims / 2,), with the ramp between fractions of dimensions that are not rounded.

    Source: YaRN (arXiv 2309.00071), section 3.2; `truncate: false` in transformers.
    """
    factor, original = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(dimension(float(scaling.get("beta_fast") or 32)), 0.0)
    high = min(dimension(float(scaling.get("beta_slow") or 1)), dims - 1.0)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / (high - low or 0.001), 0, 1)
    extrapolated = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1 / (ramp / (factor * extrapolated) + (1 - ramp) / extrapolated)


def _longrope_factor(scaling: Mapping[str, Any]) -> float | None:
    """What queries and keys are multiplied by, where config.json says it; mlx-lm derives it of the lengths alone."""
    if (attention_factor := scaling.get("attention_factor")) is not None:
        return float(attention_factor)
    if (factor := scaling.get("factor")) is None:
        return None
    original = float(scaling["original_max_position_embeddings"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
