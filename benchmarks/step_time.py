"""How the time of a step grows with its tokens: what decides how a pipeline shares its requests out.

    rows of a step: B sequences that decode, or one prompt chunk of T tokens --PagedForward--> ms, median of the rounds
    the rounds go through all sizes in turns

A step costs a + b x tokens, about: as long as b x tokens is small beside a, two steps of half the requests take twice
as long as one, and cutting a batch into cohorts gains nothing but idle stages' time. Runs on the device that
VLLM_MLX_DEVICE says; without vLLM.

    python benchmarks/step_time.py [--model DIR] [--batches 1 2 4 8 16 32 64] [--chunks 16 64 256] [--rounds 9]
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from pomarium.worker import blas
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.device import use
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models import embedded
from pomarium.worker.models.load import load
from pomarium.worker.models.paged import prepare
from pomarium.worker.settings import DeviceKind
from pomarium.worker.settings import load as load_settings

BLOCK_SIZE = 16
CONTEXT = 256
"""Tokens that each sequence has cached."""


def main() -> None:
    """See the module."""
    options = _options()
    settings = load_settings(os.environ)
    blas.load()
    device = use(settings)
    on_cpu = device.kind is DeviceKind.CPU
    loaded = load(options.model or embedded.path(), dense=on_cpu, dtype=mx.float32 if on_cpu else mx.bfloat16)
    model = prepare(loaded.model, loaded.config["model_type"])
    steps = {f"decode {count}": decode(count) for count in options.batches}
    steps |= {f"prompt {count}": prompt(count) for count in options.chunks}
    blocks = 1 + max(sum(len(s.block_tables[0]) for s in batch.sequences) for batch in steps.values())
    forward = PagedForward(
        model, GatheredAttention(PagedPool(single_group_layout(model.layers, BLOCK_SIZE, blocks), model.dtype))
    )
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(options.rounds + 1):
        for name, batch in steps.items():
            began = time.perf_counter()
            forward.run(batch, mx.array(batch.token_ids))
            if turn:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - began))
    from report import table

    median = {name: statistics.median(found) for name, found in times.items()}
    rows = [[name, f"{ms:.1f}", f"{ms / int(name.split()[1]):.2f}"] for name, ms in median.items()]
    weights = loaded.weight_bytes / 2**20
    print(f"{device.name}, {weights:.0f} MiB of weights, {CONTEXT} tokens cached; median of {options.rounds}\n")
    print(table(["rows of the step", "ms", "ms per row"], rows))


def decode(count: int) -> Batch:
    """One row for each of `count` sequences."""
    width = -(-(CONTEXT + 1) // BLOCK_SIZE)
    sequences = tuple(
        Sequence(str(n), CONTEXT, 1, (tuple(range(1 + n * width, 1 + (n + 1) * width)),)) for n in range(count)
    )
    rows = np.arange(count, dtype=np.int32)
    return Batch(sequences, rows + 5, np.full(count, CONTEXT, np.int32), rows, rows, (), {})


def prompt(count: int) -> Batch:
    """A chunk of one prompt, behind the cached tokens."""
    table = tuple(range(1, 1 + -(-(CONTEXT + count) // BLOCK_SIZE)))
    positions = np.arange(CONTEXT, CONTEXT + count, dtype=np.int32)
    last = np.array([count - 1], np.int32)
    return Batch((Sequence("p", CONTEXT, count, (table,)),), positions % 1000 + 5, positions, last, last, (), {})


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model (default: the embedded one)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--chunks", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
