"""Absorbed latent attention of decode rows: the kernels' text on the emulator against float64, and what is refused."""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
import pytest
from emulator.launcher import EmulatedLauncher
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.kernels import mla
from pomarium.kernels.cases.mla import BOUNDS, SCALE, Workload
from pomarium.kernels.gpu_family import H100, Gpu
from pomarium.kernels.reference_mla import latent_attention

TINY_GPU = Gpu(H100.family, 4)
LONGEST = 150

FIRST = mx.zeros((1,), mx.int32)
"""The token of a pool that nobody has accessed."""


@dataclass(frozen=True)
class Special:
    """A specialisation of the kernels' text. heads: numbers of heads that lead to it."""

    dtype: mx.Dtype
    block_size: int
    matrices: bool
    per_group: int
    heads: tuple[int, int]

    def tuning(self, tokens: int) -> mla.Tuning:
        return mla.Tuning(self.matrices, self.per_group, 8 if self.matrices else 1, 1, tokens)


SPECIALS = {
    "lanes float32": Special(mx.float32, 16, False, 4, (1, 9)),
    "lanes float16": Special(mx.float16, 32, False, 2, (1, 7)),
    "lanes bfloat16": Special(mx.bfloat16, 16, False, 1, (1, 3)),
    "matrices float32": Special(mx.float32, 32, True, 1, (1, 17)),
    "matrices float16": Special(mx.float16, 16, True, 2, (9, 37)),
    "matrices bfloat16": Special(mx.bfloat16, 32, True, 4, (25, 32)),
}


@pytest.fixture(scope="module")
def launcher() -> EmulatedLauncher:
    return EmulatedLauncher()


def error(workload: Workload, launcher: EmulatedLauncher) -> float:
    got = np.array(workload.run(launcher, TINY_GPU).astype(mx.float32))
    return float(np.abs(got - workload.expected()).max())


@pytest.mark.parametrize("name", SPECIALS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_workloads_match_float64(name: str, launcher: EmulatedLauncher, data: st.DataObject) -> None:
    """Ragged lengths, one token and full blocks among them, scrambled blocks, and not-a-numbers where nobody wrote."""
    special = SPECIALS[name]
    size = special.block_size
    lengths = data.draw(
        st.lists(st.integers(1, LONGEST) | st.sampled_from([1, size, 2 * size]), min_size=1, max_size=3)
    )
    tuning = special.tuning(tokens=data.draw(st.sampled_from([1, 48, 1000])))
    heads, seed = data.draw(st.integers(*special.heads)), data.draw(st.integers(0, 99))
    workload = Workload(tuple(lengths), heads, size, special.dtype, seed, tuning)
    assert error(workload, launcher) < BOUNDS[special.dtype]


@pytest.mark.parametrize("name", ["lanes float32", "matrices float32"])
def test_scores_far_apart_neither_overflow_nor_vanish(name: str, launcher: EmulatedLauncher) -> None:
    """Scores of a few thousand, the largest in the first task or in the last."""
    special = SPECIALS[name]
    for largest in (0, 99):
        workload = Workload((100,), 1, special.block_size, special.dtype, tuning=special.tuning(1))
        queries, pool = (np.array(array) for array in workload.arrays)
        pool[workload.slots(0)[largest]] = queries[0, 0] * 50
        plan = plan_of(workload)
        out, _ = mla.decode(launcher, plan, mx.array(queries), mx.array(pool), SCALE, FIRST)
        np.testing.assert_allclose(np.array(out)[0, 0], queries[0, 0, : mla.RANK] * 50, rtol=1e-6)


@pytest.mark.parametrize("kernel", ["lanes float32", "matrices float32"])
def test_what_a_step_is_padded_with_changes_nothing(kernel: str, launcher: EmulatedLauncher) -> None:
    """Two sequences in a plan of four: tables, tasks and sequences more than there are."""
    special = SPECIALS[kernel]
    workload = Workload((100, 5), 3, special.block_size, special.dtype, tuning=special.tuning(16))
    queries, pool = workload.arrays
    plan = plan_of(workload, rows=4)
    assert plan.num_sequences == 4
    assert plan.num_tasks == 8
    padded = mx.concatenate([queries, mx.full((2, *queries.shape[1:]), np.nan)])
    out, token = mla.decode(launcher, plan, padded, pool, SCALE, FIRST)
    assert np.abs(np.array(out)[:2] - workload.expected()).max() < BOUNDS[special.dtype]
    assert token.item() == 1
    with pytest.raises(ValueError, match="2 sequences do not fit 1 rows"):
        plan_of(workload, rows=1)


def plan_of(workload: Workload, gpu: Gpu = TINY_GPU, rows: int | None = None) -> mla.DecodePlan:
    return mla.plan(
        workload.block_tables,
        np.array(workload.lengths, np.int32),
        heads=workload.heads,
        dtype=workload.dtype,
        block_size=workload.block_size,
        num_blocks=workload.num_blocks,
        gpu=gpu,
        tuning=workload.tuning,
        rows=rows,
    )


def test_the_operations_that_define_it_match_float64() -> None:
    workload = Workload((70, 1, 16, 33), 5, 16, mx.float32)
    queries, pool = workload.arrays
    tables = np.where(workload.block_tables < workload.num_blocks, workload.block_tables, 0)
    finite = mx.where(mx.isnan(pool), 0, pool)
    lengths = mx.array(workload.lengths)
    out = latent_attention(queries, finite, mx.array(tables), lengths, rank=mla.RANK, block_size=16, scale=SCALE)
    np.testing.assert_allclose(np.array(out), workload.expected(), atol=BOUNDS[mx.float32])


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=40),
    heads=st.sampled_from([1, 16, 20, 128]),
    cores=st.integers(1, 200),
    block_size=st.sampled_from(mla.BLOCK_SIZES),
)
def test_tasks_cover_each_sequence_once_and_are_as_many_as_wanted(
    lengths: list[int], heads: int, cores: int, block_size: int
) -> None:
    gpu = Gpu(H100.family, cores)
    workload = Workload(tuple(lengths), heads, block_size, mx.bfloat16)
    plan = plan_of(workload, gpu)
    tasks = np.array(plan.tasks)[: 3 * plan.num_tasks].reshape(-1, 3)
    spans = np.array(plan.spans)[: 2 * len(lengths)].reshape(-1, 2)
    for sequence, (length, (first, count)) in enumerate(zip(lengths, spans, strict=True)):
        own = tasks[first : first + count]
        assert (own[:, 0] == sequence).all()
        assert own[0, 1] == 0
        assert own[-1, 2] == length
        assert (own[1:, 1] == own[:-1, 2]).all()
        assert (own[:, 2] > own[:, 1]).all()
        assert (own[:, 1] % block_size == 0).all()
    assert spans[:, 1].sum() == len(tasks)
    wanted = max(1, plan.tuning.threadgroups * cores // plan.head_blocks)
    assert len(tasks) <= wanted + len(lengths)


class NoLauncher:
    """Nothing may be launched."""

    def launch(self, *_: object) -> list[mx.array]:
        raise AssertionError("launched")


GOOD = Workload((20, 5), 3, 16, mx.float16)


@pytest.mark.parametrize(
    ("tables", "lengths", "sizes", "message"),
    [
        ([[0, 9], [1, 0]], [20, 5], {}, r"blocks 0 to 9 are not within a pool of 5"),
        ([[0, -1], [1, 0]], [20, 5], {}, r"blocks -1 to 1 are not within a pool of 5"),
        ([[0, 1], [2, 3]], [33, 5], {}, r"lengths 5 to 33 are not within tables of 2 blocks of 16 tokens"),
        ([[0, 1], [2, 3]], [20, 0], {}, r"lengths 0 to 20 are not within"),
        ([[0, 1]], [20, 5], {}, r"block tables \(1, 2\) do not fit lengths \(2,\)"),
        ([[0, 1], [2, 3]], [20, 5], {"block_size": 8}, "blocks of 8 tokens"),
        ([[0, 1], [2, 3]], [20, 5], {"dtype": mx.int8}, "does not take dtype"),
    ],
)
def test_what_leaves_the_pool_is_refused(
    tables: list[list[int]], lengths: list[int], sizes: dict[str, object], message: str
) -> None:
    facts = {"heads": 3, "dtype": mx.float16, "block_size": 16, "num_blocks": 5, "gpu": TINY_GPU, **sizes}
    with pytest.raises(ValueError, match=message):
        mla.plan(np.array(tables, np.int32), np.array(lengths, np.int32), **facts)


@pytest.mark.parametrize(
    ("queries", "pool", "dtypes", "message"),
    [
        ((2, 4, 576), (80, 576), (mx.float16, mx.float16), r"queries \(2, 4, 576\).*do not fit 2 sequences of 3 heads"),
        ((1, 3, 576), (80, 576), (mx.float16, mx.float16), r"queries \(1, 3, 576\)"),
        ((2, 3, 512), (80, 576), (mx.float16, mx.float16), r"queries \(2, 3, 512\)"),
        ((2, 3, 576), (64, 576), (mx.float16, mx.float16), r"latents \(64, 576\).*5 blocks of 16 tokens"),
        (
            (2, 3, 576),
            (80, 576),
            (mx.float32, mx.float16),
            "queries of mlx.core.float32 and latents of mlx.core.float16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    queries: tuple[int, ...], pool: tuple[int, ...], dtypes: tuple[mx.Dtype, mx.Dtype], message: str
) -> None:
    plan = plan_of(GOOD)
    with pytest.raises(ValueError, match=message):
        mla.decode(NoLauncher(), plan, mx.zeros(queries, dtypes[0]), mx.zeros(pool, dtypes[1]), SCALE, FIRST)
