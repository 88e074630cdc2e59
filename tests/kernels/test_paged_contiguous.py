"""Prompt chunks through MLX's own attention: what the kernels compute, from the step's own rows or gathered blocks."""

import mlx.core as mx
import numpy as np
import pytest

from pomarium.kernels.cases.paged_attention import OTHER_ROWS, WORKLOADS, Stage, Workload, expected, operands
from pomarium.kernels.contiguous_prefill import contiguous_prefill, contiguous_refusal, plan_contiguous
from pomarium.kernels.paged_plan import Span

CHUNKS = ((9, 9), (9, 9), (5, 44), (20, 33), (6, 6), (1, 17))
"""(tokens, context): neighbours of one length without a prefix go as one call."""


@pytest.mark.parametrize("window", [None, 7, 100])
@pytest.mark.parametrize("sinks", [False, True])
def test_it_matches_float64(window: int | None, sinks: bool) -> None:
    workload = Workload(Stage.PREFILL, 2, 3, 64, 16, mx.float32, CHUNKS, window=window, sinks=sinks)
    given = operands(workload)
    pool = [np.full((given.num_blocks, 16, 2, 64), np.nan, np.float32) for _ in range(2)]
    for buffer, brought in zip(pool, (given.keys, given.values), strict=True):
        buffer.reshape(-1, 2, 64)[given.slots] = np.array(brought)
    buffers = [mx.array(np.ascontiguousarray(buffer.swapaxes(1, 2)).reshape(-1, 64)) for buffer in pool]
    ends = np.cumsum([context for _, context in CHUNKS])
    own = np.concatenate([np.arange(end - tokens, end) for end, (tokens, _) in zip(ends, CHUNKS, strict=True)])
    plan = plan_contiguous(given.spans, given.tables, 2, 16, window)
    others = mx.full((OTHER_ROWS, 2, 64), float("nan"))
    keys, values = (mx.concatenate([others, array[mx.array(own)]]) for array in (given.keys, given.values))
    rows = given.queries, keys, values
    out, token = contiguous_prefill(plan, rows, tuple(buffers), given.scoring, mx.ones((1,), mx.int32))
    assert np.abs(np.array(out) - expected(workload)[0]).max() < 5e-6
    assert token.shape == (1,)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "window", "softcap", "refusal"),
    [
        (128, mx.bfloat16, None, None, None),
        (128, mx.bfloat16, 4096, None, None),
        (128, mx.bfloat16, 512, None, "a window of 512 over long chunks"),
        (128, mx.bfloat16, None, 30.0, "a soft-cap"),
        (256, mx.float16, None, None, "head size 256"),
        (128, mx.float32, None, None, "head size 128 of mlx.core.float32"),
    ],
)
def test_what_it_does_not_suit_is_left_to_the_kernel(
    head_dim: int, dtype: mx.Dtype, window: int | None, softcap: float | None, refusal: str | None
) -> None:
    spans = [Span(0, 4096, 4096 if window in (None, 4096) else 8192)]
    got = contiguous_refusal(spans, head_dim, dtype, window, softcap)
    assert (got is None) if refusal is None else (got is not None and refusal in got)


def test_the_samples_cover_chunks_with_and_without_a_prefix() -> None:
    for workload in (w for w in WORKLOADS if w.stage is Stage.PREFILL):
        assert {tokens == context for tokens, context in workload.spans} == {True, False}
