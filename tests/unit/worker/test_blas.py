"""MLX's matrix products on Linux go to OpenBLAS, and nobody else's do.

The binding changes a process for good, so each test that binds runs one of its own.
"""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker import blas
from pomarium.worker.errors import PomariumError, SettingsError

linux = pytest.mark.skipif(sys.platform != "linux", reason="macOS has Accelerate")


def run(code: str) -> str:
    """Standard output of `code` in a fresh interpreter, with one thread per product: more wait for each other for long
    on a machine that is busy with other tests."""
    environ = {**os.environ, blas.THREADS_VARIABLE: "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@linux
def test_products_lead_to_openblas_and_stay_right() -> None:
    out = run("""
import time
import mlx.core as mx
import numpy as np
from pomarium.worker import blas

def seconds(a, b):
    mx.eval(a @ b)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        mx.eval(a @ b)
        times.append(time.perf_counter() - start)
    return min(times)

big = mx.random.normal((1024, 1024))
small = [mx.random.normal(shape) for shape in ((1, 576), (576, 192), (3, 7, 64), (3, 64, 5))]
mx.eval(big, small)
print("before:", blas.provider(), f"{2 * 1024**3 / seconds(big, big) / 1e9:.1f} GF/s")
facts = blas.load(narrow=False)
assert facts == blas.load(narrow=False), "idempotent"
assert facts.bound == ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm"), facts
assert facts.path == blas.library_path()
assert facts.threads == 1
for name in blas.PRODUCTS:
    assert blas.provider(name).samefile(facts.path), blas.provider(name)
print("after:", blas.provider(), f"{2 * 1024**3 / seconds(big, big) / 1e9:.1f} GF/s,", facts)
for a, b in ((big, big), (big, big.T), small[:2], small[2:]):
    np.testing.assert_allclose(np.array(a @ b), np.array(a) @ np.array(b), rtol=1e-4, atol=1e-3)
""")
    print(out)
    assert "before:" in out
    assert out.index("libblas") < out.index(blas.LIBRARY)


@linux
def test_it_does_not_matter_who_is_imported_first_and_torch_and_numpy_keep_theirs() -> None:
    run("""
import numpy as np
import torch
torch.manual_seed(0)
a, b = torch.randn(300, 300), torch.randn(300, 300)
product, values = a @ b, torch.linalg.svdvals(a)
inverse = np.linalg.inv(a.numpy())
from pomarium.worker import blas
blas.load(narrow=False)
import mlx.core as mx
assert blas.provider().name == blas.LIBRARY
assert torch.equal(a @ b, product)
assert torch.equal(torch.linalg.svdvals(a), values)
assert np.array_equal(np.linalg.inv(a.numpy()), inverse)
np.testing.assert_allclose(np.array(mx.array(a.numpy()) @ mx.array(b.numpy())), product.numpy(), rtol=1e-3, atol=1e-4)
""")


@linux
def test_products_of_few_rows_are_ours_and_the_same_in_any_company() -> None:
    run("""
import mlx.core as mx
import numpy as np
from pomarium.kernels import narrow_gemm
from pomarium.worker import blas
facts = blas.load()
assert facts.narrow_lanes == narrow_gemm.lanes(), facts
if facts.narrow_lanes is None:
    raise SystemExit
assert blas.provider() is None
assert blas.provider("cblas_dgemm").name == blas.LIBRARY
weight, rows = mx.random.normal((320, 576)), mx.random.normal((48, 576))
together = np.array(rows @ weight.T)
np.testing.assert_allclose(together, np.array(rows) @ np.array(weight).T, rtol=1e-4, atol=1e-3)
for row in range(48):
    assert np.array_equal(np.array(rows[row : row + 1] @ weight.T)[0], together[row]), row
assert blas.load(narrow=False).narrow_lanes is None
assert blas.provider().name == blas.LIBRARY
""")


@linux
def test_with_threads_openblas_computes_them_all() -> None:
    run("""
from pomarium.worker import blas
assert blas.load({blas.THREADS_VARIABLE: "2"}).narrow_lanes is None
assert blas.provider().name == blas.LIBRARY
""")


@linux
def test_many_threads_of_the_process_may_multiply_at_once() -> None:
    run("""
import threading
import mlx.core as mx
import numpy as np
from pomarium.worker import blas
blas.load()
wrong = []
def work(seed):
    stream = mx.new_stream(mx.cpu)
    a = np.random.default_rng(seed).standard_normal((200, 200), dtype=np.float32)
    with mx.stream(stream):
        for _ in range(10):
            product = mx.array(a) @ mx.array(a)
            mx.eval(product)
            if not np.allclose(np.array(product), a @ a, rtol=1e-3, atol=1e-3):
                wrong.append(seed)
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong, wrong
""")


@linux
def test_the_library_is_the_installed_wheels() -> None:
    path = blas.library_path()
    assert path.is_file()
    assert path.name == blas.LIBRARY


def test_a_missing_wheel_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", absent)
    with pytest.raises(PomariumError, match=r"scipy-openblas32.* run `make install`"):
        blas.library_path()


def test_on_macos_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert blas.load({}) == blas.BlasFacts("Accelerate", None, None, (), None)


@given(st.none() | st.integers(1, 64), st.integers(1, 64))
def test_threads_leave_one_of_the_physical_cores_that_may_be_used(physical: int | None, usable: int) -> None:
    threads = blas.thread_count({"OMP_NUM_THREADS": "1"}, physical, usable)
    assert threads == max(1, min(physical or usable, usable) - 1)
    assert blas.thread_count({blas.THREADS_VARIABLE: " 3 "}, physical, usable) == 3


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "two", "²"])
def test_a_bad_thread_count_is_refused(text: str) -> None:
    with pytest.raises(
        SettingsError, match=f"{blas.THREADS_VARIABLE}='{text}' is not accepted: set it to a whole number"
    ):
        blas.thread_count({blas.THREADS_VARIABLE: text}, 2, 2)
