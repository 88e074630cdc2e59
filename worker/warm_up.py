"""Graphs of decode steps that are traced, and kernels that are compiled, before anybody waits for them.

    counts(most) --rows_at_zero--> batches whose K and V go to vLLM's null block --Forward.run--> graphs (DecodeGraphs)

The null block belongs to no request (kv_cache.layout): what is stored there is never read.
"""

import logging
import time
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from pomarium.kernels.paged_plan import room
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.forward import Forward

logger = logging.getLogger(__name__)

MOST_SECONDS = 20.0
"""What a start may wait for it. Batches of sizes that are left then are traced when they come."""


def counts(most: int) -> Iterator[int]:
    """Numbers of sequences, one for each bucket up to `most`."""
    count = 1
    while count < most:
        yield count
        count = room(count + 1)
    yield most


def rows_at_zero(sequences: int, length: int, tables: int) -> Batch:
    """So many sequences of `length` new tokens each, in the null block of each of so many block tables."""
    total = sequences * length
    last = np.arange(length - 1, total, length, dtype=np.int32)
    names = tuple(str(index) for index in range(sequences))
    rows = tuple(Sequence(name, 0, length, ((0,),) * tables) for name in names)
    positions = np.tile(np.arange(length, dtype=np.int32), sequences)
    return Batch(rows, np.zeros(total, np.int32), positions, last, np.arange(sequences, dtype=np.int32), names, {})


def warm_up(forward: Forward, most_sequences: int, tables: int, most_seconds: float = MOST_SECONDS) -> float:
    """Run a prompt, then decode steps of 1 to `most_sequences` sequences; the seconds that it took.

    Args:
        tables: block tables of a request. most_seconds: no step begins after so long.
    """
    began = time.perf_counter()
    done = 0
    for batch in (rows_at_zero(1, 2, tables), *(rows_at_zero(count, 1, tables) for count in counts(most_sequences))):
        if time.perf_counter() - began > most_seconds:
            break
        mx.eval(forward.run(batch, mx.array(batch.token_ids)))
        done = len(batch.sequences)
    seconds = time.perf_counter() - began
    logger.info("decode steps of up to %d of %d sequences are ready, in %.1f s", done, most_sequences, seconds)
    return seconds
