"""How fast this machine reads memory and multiplies, measured where its workers will compute.

    of_processor: half a second, at each join, for it suffers from whatever else the machine does
    of_gpu:       the file of the state folder, if chip and MLX are those it was measured with
                  else measure_gpu, a second or two, once --> the file

Both take the best of several runs: what else the machine does makes runs slower and none quicker.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version

from pomarium.cluster.machine import state
from pomarium.worker.errors import SettingsError

FILE = "speed.json"
MATRIX, PRODUCT = 4096, 1024
"""Of the processor: 64 MiB, more than most caches hold."""
GPU_MATRIX, GPU_PRODUCT = 16384, 4096
"""512 MiB in 16 bits: more than the 96 MiB of the largest system cache (Ultra); a product of 137 GFLOP."""
BUDGET_S = 0.3
"""For each of the two measurements."""


@dataclass(frozen=True)
class Speed:
    """bandwidth: bytes/s from memory. flops: FLOP/s of products, 32-bit on a processor and 16-bit on a GPU."""

    bandwidth: float
    flops: float


def of_gpu(chip: str, environ: Mapping[str, str]) -> Speed:
    """Measured once. Raises SettingsError: MLX cannot measure, or the file cannot be written."""
    path = state.state_folder(environ) / FILE
    measured_with = {"chip": chip, "mlx": version("mlx")}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["with"] == measured_with:
            return Speed(float(found["bandwidth"]), float(found["flops"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent, or of another version: measured anew
    speed = measure_gpu(chip)
    state.made(path.parent)
    try:
        path.write_text(json.dumps({"with": measured_with, **asdict(speed)}), encoding="utf-8")
    except OSError as error:
        raise state.unwritable(path, error) from error
    return speed


def of_processor() -> Speed:
    """In 32 bits: a matrix times a vector, and a product of two matrices."""
    import numpy as np

    matrix, vector = np.ones((MATRIX, MATRIX), np.float32), np.ones(MATRIX, np.float32)
    one, other = np.ones((PRODUCT, PRODUCT), np.float32), np.ones((PRODUCT, PRODUCT), np.float32)
    return Speed(matrix.nbytes / _best(lambda: matrix @ vector), 2 * PRODUCT**3 / _best(lambda: one @ other))


def measure_gpu(chip: str, side: int = GPU_MATRIX, product: int = GPU_PRODUCT) -> Speed:
    """MLX's default device, in 16 bits: a (side, side) matrix times a vector, and a product of two (product, product).

    Raises SettingsError, which says what to give instead.
    """
    import mlx.core as mx

    try:
        matrix, vector = mx.ones((side, side), mx.float16), mx.ones((side, 1), mx.float16)
        one, other = mx.ones((product, product), mx.float16), mx.ones((product, product), mx.float16)
        mx.eval(matrix, vector, one, other)
        bandwidth = matrix.nbytes / _best(lambda: mx.eval(matrix @ vector))
        return Speed(bandwidth, 2 * product**3 / _best(lambda: mx.eval(one @ other)))
    except RuntimeError as error:
        raise SettingsError(
            f"The chip {chip!r} is not in the table and could not be measured ({' '.join(str(error).split())[:200]}): "
            "give its figures with --bandwidth, such as 400GB/s, and --flops, such as 14TFLOPS."
        ) from error


def _best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of at least three runs, as many as BUDGET_S allows."""
    times: list[float] = []
    while len(times) < 3 or sum(times) < BUDGET_S:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
