"""One use of kernels with the results that it has to give: what the modules beside this one make, and check.py runs."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from pomarium.kernels.launch import Launcher


@dataclass(frozen=True)
class Case:
    """One use of kernels, and what it has to give.

    Attributes:
        run: launches them; its results, lazily.
        expected: the same results in float64, of the inputs as rounded to the kernels' dtype.
        bound: largest difference of any element. relative: of the largest expected value, not absolute.
    """

    name: str
    run: Callable[[Launcher], list[mx.array]]
    expected: Callable[[], list[np.ndarray]]
    bound: float
    relative: bool = False

    def error(self, results: list[mx.array]) -> float:
        """The largest difference, in units of `bound`'s; not-a-number if a result holds one.

        Raises:
            ValueError: number or shape of the results differ from what is expected.
        """
        expected = self.expected()
        if [array.shape for array in results] != [array.shape for array in expected]:
            shapes = [array.shape for array in results], [array.shape for array in expected]
            raise ValueError(f"{self.name}: results {shapes[0]} are not {shapes[1]}")
        largest = 0.0
        for got, want in zip(results, expected, strict=True):
            difference = np.abs(np.array(got.astype(mx.float32)).astype(np.float64) - want).max()
            largest = float(np.maximum(largest, difference / np.abs(want).max() if self.relative else difference))
        return largest
