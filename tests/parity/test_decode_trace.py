"""Decode graphs through MLX's own trace, on the CPU: what a step brings comes in as inputs, and none of it goes stale.

Kernels are stood in for by operations that mix everything a launch is given into each output: they compute nothing
sensible, but a graph that kept one array of its first step would give other numbers than the steps built one by one.
What kernels compute is tests/kernels' matter, there without the trace.
"""

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import TINY, build

from pomarium.kernels.gpu_family import H100
from pomarium.kernels.launch import KernelSource, Launch
from pomarium.worker.attention.decode_graphs import DecodeGraphs, Graph, compiled
from pomarium.worker.attention.kernels import KernelAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.warm_up import counts, rows_at_zero, warm_up

BLOCK_SIZE, BLOCKS = 8, 256


class Mixing:
    """A launcher whose outputs hang on the shape, the order and every element of what it is given."""

    def launch(self, source: KernelSource, launch: Launch) -> list[mx.array]:
        mixed = mx.array(0.0)
        for place, array in enumerate(launch.inputs):
            flat = array.astype(mx.float32).reshape(-1)
            mixed = mixed + mx.sum(mx.sin(flat + place) * mx.cos(mx.arange(flat.size) * 0.37))
        return [
            (mx.cos(mixed + mx.arange(int(np.prod(shape)))) if dtype != mx.int32 else mixed - mixed + 1)
            .astype(dtype)
            .reshape(shape)
            for shape, dtype in launch.outputs
        ]


def attention_of(model: PagedModel) -> KernelAttention:
    pool = PagedPool(single_group_layout(model.layers, BLOCK_SIZE, BLOCKS), model.dtype)
    return KernelAttention(pool, Mixing(), H100)


def model_of(name: str) -> PagedModel:
    return prepare(build(name, head_dim=64), TINY[name]["model_type"])


def decode(lengths: list[int], tables: int, seed: int) -> Batch:
    """One row for sequences of so many tokens, in scrambled blocks."""
    random, count = np.random.default_rng(seed), len(lengths)
    blocks = random.permutation(np.arange(1, BLOCKS)).tolist()
    sequences = tuple(
        Sequence(str(i), length - 1, 1, tuple(tuple(blocks.pop() for _ in range(12)) for _ in range(tables)))
        for i, length in enumerate(lengths)
    )
    rows, names = np.arange(count, dtype=np.int32), tuple(map(str, range(count)))
    tokens = random.integers(3, 120, count).astype(np.int32)
    return Batch(sequences, tokens, np.array(lengths, np.int32) - 1, rows, rows, names, {})


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2"])
def test_a_traced_graph_gives_for_each_step_what_its_own_graph_gives(name: str) -> None:
    model = model_of(name)
    tables = len({layer.window for layer in model.layers})
    traced: list[Graph] = []

    def trace(graph: Graph) -> Graph:
        traced.append(graph)
        return compiled(graph)

    sides = []
    for tracer in (trace, lambda graph: graph):
        attention = attention_of(model)
        forward = PagedForward(model, attention, DecodeGraphs(model, attention, tracer))
        prompt = rows_at_zero(1, 2, tables)
        forward.run(prompt, mx.array(prompt.token_ids))  # from which the plans are known
        sides.append(forward)
    for seed, lengths in enumerate([[9, 20, 33], [10, 21, 34], [70, 2, 5], [3, 4, 5, 6], [40], [41], [9, 20, 33]]):
        batch = decode(lengths, tables, seed)
        want, got = (np.array(side.run(batch, mx.array(batch.token_ids))) for side in (sides[1], sides[0]))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert len(traced) == 2  # of four rows and of one


def test_a_start_traces_the_graphs_of_batches_to_come() -> None:
    model = model_of("llama")
    attention = attention_of(model)
    graphs = DecodeGraphs(model, attention)
    forward = PagedForward(model, attention, graphs, queues=True)
    warm_up(forward, most_sequences=6, tables=1)
    assert graphs.traced == 4
    batch = decode([9, 20, 33, 5, 6], 1, 0)
    forward.run(batch, mx.array(batch.token_ids))
    assert graphs.traced == 4


def test_a_start_waits_no_longer_than_it_is_given() -> None:
    model = model_of("llama")
    attention = attention_of(model)
    graphs = DecodeGraphs(model, attention)
    warm_up(PagedForward(model, attention, graphs), most_sequences=6, tables=1, most_seconds=0.0)
    assert graphs.traced == 0


def test_each_bucket_has_its_count() -> None:
    listed = {most: list(counts(most)) for most in (1, 2, 3, 17, 64)}
    assert listed == {
        1: [1], 2: [1, 2], 3: [1, 2, 3], 17: [1, 2, 4, 8, 16, 17], 64: [1, 2, 4, 8, 16, 24, 32, 48, 64],
    }  # fmt: skip
