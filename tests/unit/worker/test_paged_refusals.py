"""Models that the paged cache does not carry are refused by name, with the way out."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.utils import _get_classes
from tiny_models import TINY, build

from pomarium.kernels.reference import Scoring
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.paged import prepare

MAMBA = {
    "model_type": "mamba", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "state_size": 8,
    "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4,
}  # fmt: skip
DYNAMIC = {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}


def mlx_model(config: dict[str, object]) -> nn.Module:
    model_class, arguments = _get_classes(dict(config))
    return model_class(arguments.from_dict(config))


def test_recurrent_state_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'mamba'.*ArraysCache.*VLLM_METAL_USE_PAGED_ATTENTION=0"):
        prepare(mlx_model(MAMBA), "mamba")


def test_rope_that_depends_on_the_whole_sequence_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'internlm3'.*row by row"):
        prepare(mlx_model({**TINY["internlm3"], **DYNAMIC}), "internlm3")


class InlineAttention(nn.Module):
    """Attends by itself, like mlx_lm/models/gemma2.py does, in a class that we do not know."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.layers = [nn.Linear(8, 8)]
        self.calls = calls

    def make_cache(self) -> list[KVCache]:
        return [KVCache()]

    def __call__(self, tokens: mx.array, cache: list[object]) -> mx.array:
        x = mx.zeros((tokens.shape[0], 2, 1, 8))
        for _ in range(self.calls):
            cache[0].attend(x, x, x, Scoring(1.0))
        return mx.zeros((tokens.shape[0], 1, 97))


@pytest.mark.parametrize(("calls", "reason"), [(0, "layers 0 do not attend"), (2, "attends twice")])
def test_a_layer_must_attend_exactly_once(calls: int, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        prepare(InlineAttention(calls), "inline")


def test_rotating_cache_that_keeps_a_prefix_is_refused() -> None:
    model = InlineAttention(1)
    model.make_cache = lambda: [RotatingKVCache(max_size=8, keep=4)]
    with pytest.raises(UnsupportedError, match=r"RotatingKVCache"):
        prepare(model, "kept")


def test_the_model_s_own_windows_are_found() -> None:
    layers = prepare(build("gemma3_text"), "gemma3_text").layers
    window = TINY["gemma3_text"]["sliding_window"]
    assert [layer.window for layer in layers] == [window, window, None, window, window, None]
