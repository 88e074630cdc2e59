"""FP8 weights become what their bytes and scales stand for, and what does not fit together is named."""

import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from tiny_models import TINY, build
from wrapper_models import E4M3, in_fp8, to_fp8, write_release

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.experts import stacked
from pomarium.worker.models.fp8 import Blocks, dequantised
from pomarium.worker.models.load import load

BLOCKS = Blocks(4, 8)


def test_every_code_has_its_value() -> None:
    """OCP's table: 0 to 448, their negatives, and one not-a-number of each sign."""
    codes = np.arange(256, dtype=np.uint8).reshape(1, 256)
    dense = dequantised({"w": mx.array(codes), "w_scale_inv": mx.ones((1, 1))}, Blocks(1, 256), mx.float32, "here")
    got = np.array(dense["w"])[0]
    np.testing.assert_array_equal(got[:127], E4M3)
    np.testing.assert_array_equal(got[128:255], -E4M3)
    assert math.isnan(got[127])
    assert math.isnan(got[255])


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.integers(0, 3))
def test_each_block_takes_its_scale(rows: int, columns: int, tall: int, wide: int, stack: int) -> None:
    """Whatever the sizes: blocks at the edges are smaller. A stack of experts is done as one."""
    rng = np.random.default_rng(rows * 20 + columns)
    made = [to_fp8(rng.standard_normal((rows, columns)).astype(np.float32), (tall, wide)) for _ in range(max(1, stack))]
    codes, scales, exact = (np.stack(parts) if stack else parts[0] for parts in zip(*made, strict=True))
    weights = {"w": mx.array(codes), "w_scale_inv": mx.array(scales), "norm": mx.ones((3,))}
    dense = dequantised(weights, Blocks(tall, wide), mx.float32, "here")
    assert dense.keys() == {"w", "norm"}
    np.testing.assert_array_equal(np.array(dense["w"]), exact)


def test_the_result_has_the_dtype_that_was_asked_for() -> None:
    codes, scales, exact = to_fp8(np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32), (4, 8))
    weights = {"w": mx.array(codes), "w_scale_inv": mx.array(scales).astype(mx.bfloat16)}
    dense = dequantised(weights, BLOCKS, mx.bfloat16, "here")["w"]
    assert dense.dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(dense.astype(mx.float32)), exact, rtol=2**-6)


CODES, SCALES = mx.zeros((8, 16), mx.uint8), mx.ones((2, 2))


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"w": CODES}, r"weight 'w' has no scales \(w_scale_inv\)"),
        ({"w_scale_inv": SCALES}, r"scales 'w_scale_inv' have no weight"),
        ({"w": CODES, "w_scale_inv": mx.ones((2, 3))}, r"have shape \(2, 3\), .* in blocks of 4 x 8 takes \(2, 2\)"),
        ({"w": CODES, "w_scale_inv": mx.ones((1,))}, r"have shape \(1,\)"),
        ({"w": CODES, "w_scale_inv": mx.zeros((2, 2), mx.uint8)}, r"are of mlx.core.uint8 and not floating point"),
        ({"w": mx.ones((8, 16)), "w_scale_inv": SCALES}, r"a weight of 2 dimensions in mlx.core.float32"),
        ({"w": mx.zeros((8,), mx.uint8), "w_scale_inv": SCALES}, r"a weight of 1 dimensions in mlx.core.uint8"),
    ],
)
def test_what_does_not_fit_together_is_named(weights: dict[str, mx.array], problem: str) -> None:
    with pytest.raises(CheckpointError, match=f"^here: the FP8 .*{problem}.*; use the complete checkpoint.$"):
        dequantised(weights, BLOCKS, mx.float32, "here")


@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_any_family_is_read_in_fp8(name: str, tmp_path: Path) -> None:
    """The conversion goes by names alone: here of families whose definitions know nothing of FP8."""
    tensors = {key: np.array(value) for key, value in tree_flatten(build(name).parameters())}
    dense, packed = in_fp8(tensors, (16, 16))
    entry = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    write_release(tmp_path, packed, {**TINY[name], "quantization_config": entry})
    loaded = dict(tree_flatten(load(tmp_path, dense=True, dtype=mx.float32).model.parameters()))
    assert sum(dtype == "F8_E4M3" for dtype, _ in packed.values()) == 4 * 7
    assert loaded.keys() == dense.keys()
    for key, value in dense.items():
        np.testing.assert_array_equal(np.array(loaded[key]), value)


def test_experts_are_stacked_by_their_numbers() -> None:
    weights = {f"l.0.mlp.experts.{i}.up_proj.weight": mx.full((2, 3), i) for i in (10, 2, 0)}
    weights["l.0.mlp.gate.weight"] = mx.zeros((4, 2))
    found = stacked(weights)
    assert found.keys() == {"l.0.mlp.switch_mlp.up_proj.weight", "l.0.mlp.gate.weight"}
    assert found["l.0.mlp.switch_mlp.up_proj.weight"][:, 0, 0].tolist() == [0, 2, 10]
