"""Decode graphs through MLX's own trace, on the CPU: what a step brings comes in as inputs, and none of it goes stale.

Kernels are stood in for by operations that mix everything a launch is given into each output: they compute nothing
sensible, but a graph that kept one array of its first step would give other numbers than the steps built one by one.
What kernels compute is tests/kernels' matter, there without the trace.
"""

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hybrid_models import HYBRIDS, build_hybrid
from tiny_models import TINY, build

from pomarium.kernels.gpu_family import H100
from pomarium.kernels.launch import KernelSource, Launch
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs, Graph, compiled
from pomarium.worker.attention.hybrid import HybridBackend
from pomarium.worker.attention.kernels import KernelAttention
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import single_group_states
from pomarium.worker.models.gated_delta_kernels import state_backend
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.warm_up import counts, rows_at_zero, warm_up

BLOCK_SIZE, BLOCKS = 16, 256


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


def backend_of(model: PagedModel) -> AttentionBackend:
    layout = single_group_layout(model.layers, BLOCK_SIZE, BLOCKS)
    kind = LatentKernelAttention if any(layer.latent for layer in model.layers) else KernelAttention
    attention = kind(PagedPool(layout, model.dtype), Mixing(), H100)
    if not model.states:
        return attention
    slots = single_group_states(model.states, BLOCK_SIZE, BLOCKS, len(layout.groups))
    return HybridBackend(attention, state_backend(slots, Mixing()))


def tables_of(model: PagedModel) -> int:
    return len({layer.window for layer in model.layers}) + bool(model.states)


def graphs_of(model: PagedModel, backend: AttentionBackend, trace: Callable[[Graph], Graph] = compiled) -> DecodeGraphs:
    assert backend.in_graphs is not None
    return DecodeGraphs(model, backend.in_graphs, trace)


def model_of(name: str) -> PagedModel:
    if name in HYBRIDS:
        return prepare(build_hybrid(name, head_dim=64), HYBRIDS[name]["model_type"])
    sizes = {"kv_lora_rank": 512, "qk_rope_head_dim": 64} if name == "deepseek_v3" else {"head_dim": 64}
    return prepare(build(name, **sizes), TINY[name]["model_type"])


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


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "gemma2", "qwen3_next", "qwen3_5_moe", "deepseek_v3"])
def test_a_traced_graph_gives_for_each_step_what_its_own_graph_gives(name: str) -> None:
    model = model_of(name)
    tables = tables_of(model)
    traced: list[Graph] = []

    def trace(graph: Graph) -> Graph:
        traced.append(graph)
        return compiled(graph)

    sides = []
    for tracer in (trace, lambda graph: graph):
        backend = backend_of(model)
        forward = PagedForward(model, backend, graphs_of(model, backend, tracer))
        prompt = rows_at_zero(1, 2, tables)
        forward.run(prompt, mx.array(prompt.token_ids))  # from which the plans are known
        sides.append(forward)
    for seed, lengths in enumerate([[9, 20, 33], [10, 21, 34], [70, 2, 5], [3, 4, 5, 6], [40], [41], [9, 20, 33]]):
        batch = decode(lengths, tables, seed)
        want, got = (np.array(side.run(batch, mx.array(batch.token_ids))) for side in (sides[1], sides[0]))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert len(traced) == 2  # of four rows and of one


@pytest.mark.parametrize("name", ["llama", "qwen3_5", "deepseek_v3"])
def test_a_start_traces_the_graphs_of_batches_to_come(name: str) -> None:
    model = model_of(name)
    backend = backend_of(model)
    graphs = graphs_of(model, backend)
    forward = PagedForward(model, backend, graphs, queues=True)
    warm_up(forward, most_sequences=6, tables=tables_of(model))
    assert graphs.traced == 4
    batch = decode([9, 20, 33, 5, 6], tables_of(model), 0)
    forward.run(batch, mx.array(batch.token_ids))
    assert graphs.traced == 4


def test_a_start_waits_no_longer_than_it_is_given() -> None:
    model = model_of("llama")
    backend = backend_of(model)
    graphs = graphs_of(model, backend)
    warm_up(PagedForward(model, backend, graphs), most_sequences=6, tables=1, most_seconds=0.0)
    assert graphs.traced == 0


def test_each_bucket_has_its_count() -> None:
    listed = {most: list(counts(most)) for most in (1, 2, 3, 17, 64)}
    assert listed == {
        1: [1], 2: [1, 2], 3: [1, 2, 3], 17: [1, 2, 4, 8, 16, 17], 64: [1, 2, 4, 8, 16, 24, 32, 48, 64],
    }  # fmt: skip
