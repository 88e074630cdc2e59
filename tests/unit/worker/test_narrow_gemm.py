"""Our product of few rows: right to float32's accuracy, the same bits in any company, everything else handed on."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.kernels import narrow_gemm

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
_C = ctypes
SIGNATURE = ctypes.CFUNCTYPE(
    None, *[_C.c_int] * 6, _C.c_float, _C.c_void_p, _C.c_int, _C.c_void_p, _C.c_int, _C.c_float, _C.c_void_p, _C.c_int
)
LANES = narrow_gemm.lanes()

pytestmark = pytest.mark.skipif(LANES is None, reason="this processor has no fused multiply-add")


class Handed:
    """A cblas_sgemm that only notes its arguments, and the product that hands on to it."""

    def __init__(self, lanes: int) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self._callback = SIGNATURE(lambda *arguments: self.calls.append(arguments))
        address = ctypes.cast(self._callback, ctypes.c_void_p).value
        assert address is not None
        self._product = narrow_gemm.compile_product(address, lanes)
        self.sgemm: Callable[..., None] = SIGNATURE(self._product.address)


@pytest.fixture(scope="module", params=[8, 16])
def handed(request: pytest.FixtureRequest) -> Handed:
    """Both widths run anywhere: LLVM splits the vectors that a processor does not have."""
    return Handed(request.param)


def multiply(sgemm: Callable[..., None], a: np.ndarray, b: np.ndarray, lda: int, ldb: int, ldc: int) -> np.ndarray:
    """A B' by `sgemm`, from and into rows that are lda, ldb, ldc apart; asserts that nothing between rows changed."""

    def spread(rows: np.ndarray, stride: int) -> np.ndarray:
        wide = np.full((len(rows), stride), np.nan, np.float32)
        wide[:, : rows.shape[1]] = rows
        return wide

    (m, k), n = a.shape, len(b)
    x, w, c = spread(a, lda), spread(b, ldb), np.full((m, ldc), np.float32(7))
    sgemm(ROW_MAJOR, PLAIN, TRANSPOSED, m, n, k, 1.0, x.ctypes.data, lda, w.ctypes.data, ldb, 0.0, c.ctypes.data, ldc)
    assert (c[:, n:] == 7).all()
    return c[:, :n]


@given(
    m=st.integers(1, 33),
    n=st.integers(1, 40),
    vectors=st.integers(1, 40),
    gaps=st.tuples(*[st.integers(0, 9)] * 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_products_are_right(handed: Handed, m: int, n: int, vectors: int, gaps: tuple[int, ...], seed: int) -> None:
    k = 16 * vectors
    random = np.random.default_rng(seed)
    a, b = random.standard_normal((m, k), np.float32), random.standard_normal((n, k), np.float32)
    got = multiply(handed.sgemm, a, b, k + gaps[0], k + gaps[1], n + gaps[2])
    exact = a.astype(np.float64) @ b.T.astype(np.float64)
    # Rounding of a sum of k products, in any order: at most k ulp of the sum of their sizes.
    bound = np.finfo(np.float32).eps * k * (np.abs(a) @ np.abs(b).T)
    assert (np.abs(got - exact) <= bound).all()
    assert handed.calls == []
    for row in range(m):
        assert np.array_equal(multiply(handed.sgemm, a[row : row + 1], b, k, k, n)[0], got[row])


def test_special_values_pass(handed: Handed) -> None:
    a = np.ones((2, 32), np.float32)
    b = np.ones((3, 32), np.float32)
    b[0, 5], b[1, 7] = np.inf, np.nan
    got = multiply(handed.sgemm, a, b, 32, 32, 3)
    assert np.isinf(got[:, 0]).all()
    assert np.isnan(got[:, 1]).all()
    assert (got[:, 2] == 32).all()


@pytest.mark.parametrize(
    "changed",
    [
        {0: 102},
        {1: TRANSPOSED},
        {2: PLAIN},
        {3: narrow_gemm.MAX_ELEMENTS // 32 + 1},
        {5: 0},
        {5: 33},
        {6: 0.5},
        {11: 1.0},
    ],
)
def test_anything_else_is_handed_on_as_it_came(handed: Handed, changed: dict[int, float]) -> None:
    arguments: list[Any] = [ROW_MAJOR, PLAIN, TRANSPOSED, 2, 3, 32, 1.0, 64, 32, 128, 32, 0.0, 192, 3]
    for position, value in changed.items():
        arguments[position] = value
    handed.calls.clear()
    handed.sgemm(*arguments)
    assert handed.calls == [tuple(arguments)]
    handed.calls.clear()
