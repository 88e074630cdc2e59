"""Which rows of a step take which embeddings of which images: pure arithmetic over positions.

    Picture (where an image stands in its prompt) x rows of a sequence --rows_of_pictures--> PictureRows

A chunk may begin or end in the middle of an image; what is cached of it is not computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Picture:
    """One image of a request.

    Attributes:
        key: of its embeddings in the encoder cache; equal for equal images.
        offset, length: the tokens that stand for it in the prompt.
        takes: bool (length,), which of these take an embedding; the others are text, such as separators.
    """

    key: str
    offset: int
    length: int
    takes: np.ndarray

    @cached_property
    def before(self) -> np.ndarray:
        """int64 (length,): how many embeddings the tokens before each one take."""
        found: np.ndarray = np.cumsum(self.takes) - self.takes
        return found


@dataclass(frozen=True)
class PictureRows:
    """Rows that take embeddings of one image.

    Attributes:
        rows: int32 (P,), of the batch. embeddings: int32 (P,), which of the image's they take.
    """

    key: str
    rows: np.ndarray
    embeddings: np.ndarray


def rows_of_pictures(pictures: Sequence[Picture], start: int, end: int, first_row: int) -> list[PictureRows]:
    """What the positions `start` .. `end` - 1 of a request take, whose row of `start` is `first_row`."""
    found = []
    for picture in pictures:
        low, high = max(start, picture.offset), min(end, picture.offset + picture.length)
        if low >= high:
            continue
        within = np.arange(low - picture.offset, high - picture.offset)
        taking = within[picture.takes[within]]
        if len(taking):
            rows = taking + (picture.offset - start + first_row)
            found.append(PictureRows(picture.key, rows.astype(np.int32), picture.before[taking].astype(np.int32)))
    return found
