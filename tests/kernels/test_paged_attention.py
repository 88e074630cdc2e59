"""Paged attention: the kernels' text on the emulator against float64, and what is refused before any launch."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from emulator.launcher import EmulatedLauncher
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.kernels import paged_attention
from pomarium.kernels.cases.paged_attention import (
    BOUNDS,
    WORKLOADS,
    Operands,
    Stage,
    Workload,
    attend,
    expected,
    operands,
)
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.launch import KernelSource, Launch
from pomarium.kernels.paged_attention import AttentionShape, decode, plan_decode, plan_prefill, prefill
from pomarium.kernels.paged_plan import Span
from pomarium.kernels.paged_tuning import DecodeVariant
from pomarium.kernels.reference import Scoring

TINY = Gpu(Family.CUDA, 1)
SHAPE = AttentionShape(4, 2, 64, 9, 16, mx.float32)


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


def error(workload: Workload, launcher: EmulatedLauncher) -> float:
    pairs = zip(attend(workload, launcher), expected(workload), strict=True)
    return max(float(np.abs(np.array(got.astype(mx.float32)) - want).max()) for got, want in pairs)


@st.composite
def spans(draw: st.DrawFn, workload: Workload) -> tuple[tuple[int, int], ...]:
    """Ragged, one token and full blocks among them, and at most as many query tokens as make the same kernel."""
    most = max(tokens for tokens, _ in workload.spans)
    block = workload.block_size
    contexts = st.integers(1, 150) | st.sampled_from([1, block - 1, block, block + 1, 4 * block])
    chosen = [(most, most + draw(st.integers(0, 100)))]
    for _ in range(draw(st.integers(0, 3))):
        tokens = draw(st.integers(1, most))
        chosen.append((tokens, max(tokens, draw(contexts))))
    return tuple(chosen)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_random_lengths_match_float64(workload: Workload, launcher: EmulatedLauncher, data: st.DataObject) -> None:
    window = None if workload.window is None else data.draw(st.integers(1, 60))
    cores = data.draw(st.sampled_from([1, 3, 40]))
    seed = data.draw(st.integers(0, 99))
    gpu = Gpu(workload.gpu.family, cores)
    chosen = replace(workload, spans=data.draw(spans(workload)), cuts=(), window=window, gpu=gpu, seed=seed)
    assert error(chosen, launcher) < BOUNDS[workload.dtype]


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group_size(group: int, stage: Stage, launcher: EmulatedLauncher) -> None:
    """1 to 16 query heads per KV head, with lengths, window, block size and dtype that go round with it."""
    rng, dtype = np.random.default_rng(group), list(BOUNDS)[group % 3]
    most = 3 if stage is Stage.DECODE else 40
    tokens = [1, *rng.integers(1, most, 2).tolist()]
    chosen = tuple((count, count + int(before)) for count, before in zip(tokens, rng.integers(0, 90, 3), strict=True))
    window = int(rng.integers(1, 60)) if group % 2 else None
    gpu = Gpu(list(Family)[group // 2 % 2], 3)
    workload = Workload(stage, 2, group, 64, (8, 16, 32)[group // 3 % 3], dtype, chosen, window, gpu=gpu, seed=group)
    assert error(workload, launcher) < BOUNDS[dtype]


@pytest.mark.parametrize(
    "variant",
    [
        DecodeVariant(rows=16, lanes=8, unroll=1, simdgroups=4),
        DecodeVariant(rows=16, lanes=4, unroll=1, simdgroups=1),
        DecodeVariant(rows=8, lanes=4, unroll=2, simdgroups=8),
        DecodeVariant(rows=4, lanes=8, unroll=4, simdgroups=2),
        DecodeVariant(rows=2, lanes=16, unroll=8, simdgroups=4),
        DecodeVariant(rows=1, lanes=32, unroll=16, simdgroups=1),
    ],
    ids=lambda variant: f"{variant.rows} rows, {variant.lanes} lanes, unrolled {variant.unroll}",
)
def test_no_choice_changes_a_result(
    variant: DecodeVariant, launcher: EmulatedLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that no family makes today: lanes that hold scores of several rows, or of several keys."""
    monkeypatch.setattr(paged_attention, "decode_variant", lambda *_: variant)
    spans = (3, 90), (1, 1), (2, 130), (1, 64)
    workload = Workload(Stage.DECODE, 1, 6, 64, 16, mx.float16, spans, window=70, sinks=True)
    for peak in (False, True):
        assert error(replace(workload, peak=peak), launcher) < BOUNDS[mx.float16]


def test_every_value_of_the_issue_is_among_the_workloads() -> None:
    for stage in Stage:
        chosen = [workload for workload in WORKLOADS if workload.stage is stage]
        assert {workload.head_dim for workload in chosen} == {64, 80, 96, 112, 128, 192, 256, 512}
        assert {workload.block_size for workload in chosen} == {8, 16, 32}
        assert len({workload.dtype for workload in chosen}) == 3
        assert {workload.gpu.family for workload in chosen} == set(Family)


class NoLaunch:
    """A launcher that nothing may reach."""

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        raise AssertionError(f"{source.name} was launched")


def table(*blocks: int) -> np.ndarray:
    return np.array(blocks, np.int32)


@pytest.mark.parametrize("plan", [plan_decode, plan_prefill])
@pytest.mark.parametrize(
    ("shape", "span", "blocks", "message"),
    [
        (SHAPE, Span(0, 1, 20), table(3, 9), r"block table \(1, 2\) names block 9 at \[0, 1\], outside a pool of 9"),
        (SHAPE, Span(0, 1, 20), table(-1, 2), r"names block -1 at \[0, 0\]"),
        (SHAPE, Span(0, 1, 33), table(1, 2), "context of 33 tokens is longer than its block table: 2 blocks of 16"),
        (SHAPE, Span(0, 3, 2), table(1), "3 query tokens within a context of 2"),
        (SHAPE, Span(0, 0, 2), table(1), "0 query tokens"),
        (replace(SHAPE, head_dim=72), Span(0, 1, 2), table(1), "head size 72 is not one of 64"),
        (replace(SHAPE, block_size=4), Span(0, 1, 2), table(1), "block size 4 is not one of 8"),
        (replace(SHAPE, dtype=mx.int32), Span(0, 1, 2), table(1), "dtype .*int32 is not"),
        (replace(SHAPE, num_heads=5), Span(0, 1, 2), table(1), "5 query heads are no multiple of 2"),
        (replace(SHAPE, num_blocks=1 << 27), Span(0, 1, 2), table(1), "over 2\\^31"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    plan: object, shape: AttentionShape, span: Span, blocks: np.ndarray, message: str
) -> None:
    assert callable(plan)
    with pytest.raises(ValueError, match=message):
        plan([span], [blocks], shape, None, TINY)


def test_blocks_that_a_window_has_passed_may_be_anything() -> None:
    """vLLM frees them and leaves whatever it likes in the table."""
    plan_decode([Span(0, 1, 40)], [table(-7, 99, 3)], SHAPE, 8, TINY)
    with pytest.raises(ValueError, match="names block 99"):
        plan_decode([Span(0, 1, 40)], [table(-7, 99, 3)], SHAPE, 9, TINY)


@pytest.mark.parametrize(
    ("queries", "keys", "values", "sinks", "message"),
    [
        ((2, 4, 64), (288, 64), (288, 64), None, r"queries \(2, 4, 64\) are not at least \(3, 4, 64\)"),
        ((3, 4, 128), (288, 64), (288, 64), None, r"queries \(3, 4, 128\)"),
        ((3, 4, 64), (287, 64), (288, 64), None, r"keys \(287, 64\) are not \(288, 64\)"),
        ((3, 4, 64), (288, 64), (288, 32), None, r"values \(288, 32\) are not \(288, 64\)"),
        ((3, 4, 64), (288, 64), (288, 64), (3,), r"sinks \(3,\) are not one per query head \(4,\)"),
    ],
)
def test_arrays_that_do_not_fit_the_plan_are_refused(
    queries: tuple[int, ...],
    keys: tuple[int, ...],
    values: tuple[int, ...],
    sinks: tuple[int, ...] | None,
    message: str,
) -> None:
    arguments = [Span(0, 3, 20)], [table(1, 2)], SHAPE, None, TINY
    arrays = mx.zeros(queries), (mx.zeros(keys), mx.zeros(values))
    scoring, token = Scoring(1.0, None if sinks is None else mx.zeros(sinks)), mx.zeros((1,), mx.int32)
    with pytest.raises(ValueError, match=message):
        decode(NoLaunch(), plan_decode(*arguments), *arrays, scoring, token)
    with pytest.raises(ValueError, match=message):
        prefill(NoLaunch(), plan_prefill(*arguments), *arrays, scoring, token)


@pytest.mark.parametrize("odd", range(3))
def test_a_mix_of_dtypes_is_refused(odd: int) -> None:
    arguments = [Span(0, 1, 20)], [table(1, 2)], SHAPE, None, TINY
    dtypes = [mx.float16 if index == odd else mx.float32 for index in range(3)]
    queries, keys, values = (mx.zeros(s, d) for s, d in zip(((1, 4, 64), (288, 64), (288, 64)), dtypes, strict=True))
    scoring, token = Scoring(1.0), mx.zeros((1,), mx.int32)
    with pytest.raises(ValueError, match="are not all"):
        decode(NoLaunch(), plan_decode(*arguments), queries, (keys, values), scoring, token)
    with pytest.raises(ValueError, match="are not all"):
        prefill(NoLaunch(), plan_prefill(*arguments), queries, (keys, values), scoring, token)


def test_the_pool_of_a_workload_is_scrambled_and_no_larger_than_it_need_be() -> None:
    """What the other tests rest on: a kernel that reads a block beside its own, or a key too many, meets NaN."""
    given: Operands = operands(WORKLOADS[0])
    blocks = np.concatenate(given.tables)
    assert len(set(blocks.tolist())) == len(blocks)
    assert (np.diff(blocks) != 1).any()
    assert all(len(t) == -(-span.context // 16) for t, span in zip(given.tables, given.spans, strict=True))
