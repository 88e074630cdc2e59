"""One step's ragged batch: T token rows of several sequences, one after another.

    Step + RequestTable --build_batch--> Batch --forward--> logits of `logit_rows` --> sampling

Everything here is host data (numpy, ints). A row is one token; sequences take part with one row (decode) or several
(a prompt chunk), and nothing is padded.
"""

from dataclasses import dataclass

import numpy as np

from pomarium.worker.pictures import PictureRows, rows_of_pictures
from pomarium.worker.requests import RequestState
from pomarium.worker.step import BlockTables


@dataclass(frozen=True)
class Sequence:
    """The rows of one request in a step.

    Attributes:
        start: position of its first row in the sequence, i.e. how many tokens are cached before it.
        length: how many rows. block_tables: its blocks, one tuple per cache group.
    """

    request_id: str
    start: int
    length: int
    block_tables: BlockTables


@dataclass(frozen=True)
class Batch:
    """The rows of a step.

    Attributes:
        sequences: in row order. token_ids, positions: int32 (T,).
        logit_rows: int32 (N,), ascending, the rows whose logits are wanted; N may be 0.
        sample_index: int32 (R,), for the requests that sample, in order: index into `logit_rows`.
        samplers: those requests' ids.
        prompt_index: request id -> (first, last) half-open range of `logit_rows` for prompt log-probabilities.
        pictures: the rows that take embeddings of images.
    """

    sequences: tuple[Sequence, ...]
    token_ids: np.ndarray
    positions: np.ndarray
    logit_rows: np.ndarray
    sample_index: np.ndarray
    samplers: tuple[str, ...]
    prompt_index: dict[str, tuple[int, int]]
    pictures: tuple[PictureRows, ...] = ()


def build_batch(scheduled: list[tuple[RequestState, int]]) -> Batch:
    """Lay out the rows of the scheduled (request, number of tokens) pairs, in their order.

    A request samples when its rows reach the end of what is known of it; a prompt chunk before that only fills the
    cache.
    """
    sequences: list[Sequence] = []
    token_ids: list[int] = []
    positions: list[np.ndarray] = []
    logit_rows: list[int] = []
    sample_index: list[int] = []
    samplers: list[str] = []
    prompt_index: dict[str, tuple[int, int]] = {}
    pictures: list[PictureRows] = []
    for request, length in scheduled:
        start, end, first_row = request.num_computed_tokens, request.num_computed_tokens + length, len(token_ids)
        token_ids += request.token_ids[start:end]
        positions.append(np.arange(start, end, dtype=np.int32))
        sequences.append(Sequence(request.id, start, length, tuple(tuple(table) for table in request.block_tables)))
        pictures += rows_of_pictures(request.pictures, start, end, first_row)
        samples = end >= len(request.token_ids)
        if request.sampling.num_prompt_logprobs is not None and start < request.num_prompt_tokens - 1:
            rows = range(first_row, first_row + min(end, request.num_prompt_tokens - 1) - start)
            prompt_index[request.id] = (len(logit_rows), len(logit_rows) + len(rows))
            logit_rows += rows
        if samples:
            sample_index.append(len(logit_rows))
            samplers.append(request.id)
            logit_rows.append(len(token_ids) - 1)
    return Batch(
        tuple(sequences),
        np.array(token_ids, np.int32),
        np.concatenate(positions),
        np.array(logit_rows, np.int32),
        np.array(sample_index, np.int32),
        tuple(samplers),
        prompt_index,
        tuple(pictures),
    )
