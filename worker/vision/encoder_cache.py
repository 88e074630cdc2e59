"""Embeddings of images that requests still need, by key: what the engine's scheduler counts as its encoder cache.

    Step.unseen (tiles) --take--> Tower --> kept until Step.forgotten names it
    Batch.pictures --gather--> rows and their embeddings

The scheduler decides what is computed and what is forgotten (vllm/v1/core/encoder_cache_manager.py); this keeps book of
nothing, so both agree by construction.
"""

from collections.abc import Iterable, Sequence

import mlx.core as mx
import numpy as np

from pomarium.worker.pictures import PictureRows
from pomarium.worker.step import Step
from pomarium.worker.vision.tower import Tower


class EncoderCache:
    """Embeddings (n, hidden_size) by key."""

    def __init__(self, tower: Tower) -> None:
        self._tower = tower
        self._kept: dict[str, mx.array] = {}

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Of all that is kept."""
        return sum(array.nbytes for array in self._kept.values())

    def take(self, step: Step) -> None:
        """Forget what the step says is not needed any more, and compute the images that it brings."""
        self.forget(step.forgotten)
        for key, tiles in step.unseen.items():
            self._kept[key] = self._tower(tiles)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop these; one that was never computed is nobody's."""
        for key in keys:
            self._kept.pop(key, None)

    def clear(self) -> None:
        """Drop all."""
        self._kept.clear()

    def gather(self, pictures: Sequence[PictureRows]) -> tuple[mx.array, mx.array]:
        """(int32 (P,) rows, (P, hidden_size) embeddings) of a batch's pictures.

        Raises:
            KeyError: of an image that the scheduler never had computed, or has had forgotten.
        """
        rows = np.concatenate([picture.rows for picture in pictures])
        taken = [self._kept[picture.key][mx.array(picture.embeddings)] for picture in pictures]
        return mx.array(rows), mx.concatenate(taken)
