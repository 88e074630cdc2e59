"""The width of a layer's arrays, as configs of several families state it."""

from typing import Any

import pytest

from pomarium.worker.activations import layer_width


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ({"intermediate_size": 96}, 96),
        ({"intermediate_size": 96, "use_double_wide_mlp": True}, 192),
        ({"intermediate_size": 96, "moe_intermediate_size": 16, "num_experts_per_tok": 8}, 96),
        ({"moe_intermediate_size": 16, "num_experts_per_tok": 8}, 128),
        ({"n_inner": 48}, 48),
        ({"n_inner": None}, 128),
    ],
)
def test_layer_width(text: dict[str, Any], width: int) -> None:
    assert layer_width(text, 32) == width
