"""Decode steps as graphs that serve many steps, on emulated kernels: padded to buckets, with late tokens.

MLX cannot trace what the emulator runs, so here a "trace" keeps the function and calls it anew. What could go stale in
a trace goes stale in it, too: the function is made for the first step of its bucket and gets later steps' arrays only.
"""

import logging
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from emulator.counting import CountingLauncher
from equality import BOUND
from hybrid_models import HYBRIDS, ONE_SLOT, HybridDriver, build_hybrid
from hypothesis import given
from hypothesis import strategies as st
from step_driver import Driver
from tiny_models import TINY, build
from wrapper_models import build_text

from pomarium.kernels.gpu_family import H100, Family, Gpu
from pomarium.kernels.paged_attention import AttentionShape, plan_decode
from pomarium.kernels.paged_plan import Span, room, room_of_tables
from pomarium.worker import selftest
from pomarium.worker.attention import decode_graphs
from pomarium.worker.attention.choose import decode_graphs as graphs_of
from pomarium.worker.attention.decode_graphs import DecodeGraphs, Graph
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.hybrid import HybridBackend
from pomarium.worker.attention.kernels import KernelAttention, KernelGraphs, paged_pool
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.kv_cache.states import StateLayout
from pomarium.worker.models.gated_delta_kernels import KernelStateBackend, state_backend
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.sampling_params import SamplingParams

LENGTHS = {"one": 1, "short": 5, "block": 16, "long": 43}
NEW_TOKENS = 5
CHUNKS = (7, 1, 16, 50)
APPLE = Gpu(Family.APPLE, 4)


def untraced(graph: Graph) -> Graph:
    """In mx.compile's place; see the module."""
    return graph


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(3, 120, length).tolist() for name, length in LENGTHS.items()}


def driver_of(
    paged: PagedModel, gpu: Gpu, trace: Callable[[Graph], Graph] = untraced
) -> tuple[Driver, DecodeGraphs, CountingLauncher]:
    """With kernels, graphs and tokens that are read late."""
    driver, launcher = Driver(paged, block_size=8, late=True), CountingLauncher()
    # The emulator fills what a kernel leaves unset with not-a-numbers, and so the pool.
    attention = KernelAttention(paged_pool(driver.layout, paged.dtype, launcher), launcher, gpu)
    graphs = DecodeGraphs(paged, KernelGraphs(attention.kernels), trace)
    driver.recorder.inner = PagedForward(paged, attention, graphs, queues=True)
    return driver, graphs, launcher


def llama() -> PagedModel:
    return prepare(build("llama", head_dim=64), "llama")


@pytest.mark.parametrize(
    ("name", "gpu", "bound"),
    [("llama", APPLE, BOUND), ("gpt_oss", Gpu(Family.APPLE, 1), BOUND), ("gemma2", H100, BOUND),
     ("gemma4_dense", APPLE, 8 * BOUND)],
    ids=["llama", "gpt_oss: windows and sinks", "gemma2: soft-cap", "gemma4: shared layers, two head sizes"],
)  # fmt: skip
def test_graphs_give_the_operations_tokens_and_logits(name: str, gpu: Gpu, bound: float) -> None:
    """Prompts in chunks, then four sequences that decode, of which one is preempted with its token unread."""
    if name.startswith("gemma4"):
        paged = prepare(build_text(name, head_dim=64, global_head_dim=128), "gemma4_text")
    else:
        paged = prepare(build(name, head_dim=64), TINY[name]["model_type"])
    got, graphs, _ = driver_of(paged, gpu)
    want = Driver(paged, block_size=8)

    def preempt(step: int) -> list[str]:
        return ["block"] if step == 4 else []

    tokens = want.run(prompts(), NEW_TOKENS, chunks=CHUNKS, preempt=preempt)
    assert got.run(prompts(), NEW_TOKENS, chunks=CHUNKS, preempt=preempt) == tokens
    assert graphs.traced >= 2
    for request, logits in want.recorder.logits.items():
        for position, row in logits.items():
            scale = np.abs(row).max()
            assert np.abs(got.recorder.logits[request][position] - row).max() / scale < bound


@pytest.mark.parametrize(("name", "tokens_per_slot"), [("qwen3_next", ONE_SLOT), ("qwen3_5", 8)])
def test_hybrid_models_go_on_from_their_states(name: str, tokens_per_slot: int) -> None:
    """Of three rows and a padded one, whose states begin as not-a-numbers; one sequence is preempted, token unread."""
    paged = prepare(build_hybrid(name, head_dim=64, num_hidden_layers=3), HYBRIDS[name]["model_type"])
    own = dict(list(prompts().items())[:3])
    last = list(own)[-1]

    def preempt(step: int) -> list[str]:
        return [last] if step == 4 else []

    want = HybridDriver(paged, 8)
    tokens = want.run(own, NEW_TOKENS, chunks=CHUNKS, preempt=preempt)
    launcher, pools = CountingLauncher(), []

    def attention(pool: PagedPool) -> KernelAttention:
        return KernelAttention(pool, launcher, APPLE)

    def states(layout: StateLayout) -> KernelStateBackend:
        backend = state_backend(layout, launcher)
        assert isinstance(backend, KernelStateBackend)
        pools.append(backend)
        return backend

    def graphs(model: PagedModel, backend: HybridBackend) -> DecodeGraphs:
        assert backend.in_graphs is not None
        return DecodeGraphs(model, backend.in_graphs, untraced)

    got = HybridDriver(
        paged, 8, tokens_per_slot=tokens_per_slot, states=states, attention=attention, late=True, graphs=graphs
    )
    assert got.run(own, NEW_TOKENS, chunks=CHUNKS, preempt=preempt) == tokens
    assert got.graphs is not None
    assert got.graphs.traced >= 1
    for request, logits in want.recorder.logits.items():
        for position, row in logits.items():
            assert np.abs(got.recorder.logits[request][position] - row).max() <= 2e-5 * np.abs(row).max()
    (backend,) = pools
    for pool in backend.ordered:
        assert np.isnan(np.array(pool.arrays[0][0])).all(), "a padded row was stored"


def test_a_graph_is_traced_once_for_many_steps_and_least_used_ones_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MOST_GRAPHS", 1)
    traced: list[Graph] = []

    def trace(graph: Graph) -> Graph:
        traced.append(graph)
        return graph

    driver, graphs, _ = driver_of(llama(), APPLE, trace)
    driver.run({"a": [5, 6, 7]}, 12)
    assert (len(traced), graphs.traced) == (1, 1)
    driver.run({"b": [5, 6, 7], "c": [8, 9], "d": [3]}, 4)  # four rows, one of them padding
    assert len(traced) == 2
    driver.run({"e": [5, 6, 7]}, 4)
    assert len(traced) == 3


def test_a_padded_row_is_stored_nowhere() -> None:
    """The pool began as not-a-numbers: what no sequence owns still is."""
    driver, graphs, _ = driver_of(llama(), APPLE)
    driver.run({"a": [5, 6, 7], "b": [8, 9], "c": [3]}, 4)
    assert graphs.traced
    owned = {block for request in "abc" for block in driver_blocks(driver, request)}
    pool = graphs._attention._kernels.pool
    keys = pool.keys_and_values(0)[0].reshape(pool.layout.num_blocks, -1)
    written = set(np.flatnonzero(~np.isnan(np.array(keys)).all(axis=1)).tolist())
    assert written == owned


def driver_blocks(driver: Driver, request: str) -> list[int]:
    """Before the runner hears that it has ended, it holds its blocks."""
    return driver.runner.requests[request].block_tables[0]


def test_a_model_that_looks_at_values_is_built_step_by_step_and_said_so_once(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(graph: Graph) -> Graph:
        def run(*arguments: object) -> tuple[mx.array, list[mx.array]]:
            raise ValueError("[eval] Attempting to eval an array during function transformations")

        return run

    paged = llama()
    driver, graphs, _ = driver_of(paged, APPLE, refuse)
    with caplog.at_level(logging.INFO, "pomarium"):
        tokens = driver.run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    assert tokens == Driver(paged, block_size=8).run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    assert graphs.traced == 0
    assert len([r for r in caplog.records if "cannot be traced" in r.getMessage()]) == 1


def test_only_a_pool_that_kernels_take_whole_has_graphs() -> None:
    small = prepare(build("llama", head_dim=8), "llama")
    layout = Driver(small, block_size=8).layout
    launcher = CountingLauncher()
    assert graphs_of(small, KernelAttention(paged_pool(layout, small.dtype, launcher), launcher, H100)) is None
    assert graphs_of(small, GatheredAttention(PagedPool(layout, small.dtype))) is None


@pytest.mark.parametrize("sampling", [
    SamplingParams(seed=3),
    SamplingParams(seed=3, temperature=0.7, top_k=5, top_p=0.8),
    SamplingParams(seed=3, temperature=0.7, top_p=0.5),
    SamplingParams(seed=3, temperature=0.7, repetition_penalty=1.3),
], ids=["whole rows", "top_k", "top_p", "penalised, by the host"])  # fmt: skip
def test_seeded_tokens_are_those_of_steps_that_are_waited_for(sampling: SamplingParams) -> None:
    paged = llama()
    got, _, _ = driver_of(paged, APPLE)
    want = Driver(paged, block_size=8).run(prompts(), NEW_TOKENS, sampling=sampling)
    assert got.run(prompts(), NEW_TOKENS, sampling=sampling) == want


def test_each_step_is_counted_with_its_time() -> None:
    driver, _, _ = driver_of(llama(), APPLE)
    driver.run({"a": [5, 6, 7], "b": [9]}, 3)
    assert [(s.requests, s.rows, s.sampled) for s in driver.stats] == [(2, 4, 2), (2, 2, 2), (2, 2, 2)]
    assert all(s.seconds > 0 for s in driver.stats)


def test_the_selftest_goes_through_graphs_and_says_if_none_can_be_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLX cannot trace what the emulator runs at once."""
    paged, launcher = llama(), CountingLauncher()

    def backend(pool: PagedPool) -> KernelAttention:
        return KernelAttention(pool, launcher, APPLE)

    wanted = [prompts()["short"], prompts()["block"]]
    plain = selftest.generate(backend, paged, wanted, 4)
    with pytest.raises(UnsupportedError, match="POMARIUM_DECODE_GRAPHS=0"):
        selftest.generate(backend, paged, wanted, 4, graphs=True)

    def traced(model: PagedModel, attention: KernelAttention) -> DecodeGraphs:
        return DecodeGraphs(model, KernelGraphs(attention.kernels), untraced)

    monkeypatch.setattr(selftest, "decode_graphs", traced)
    assert selftest.generate(backend, paged, wanted, 4, graphs=True) == plain


# --- the plan of a bucket ---------------------------------------------------------------------------------------------

SHAPE = AttentionShape(4, 2, 64, 4096, 16, mx.float32)


@given(st.lists(st.integers(1, 2000), min_size=1, max_size=9), st.sampled_from([None, 40, 700]))
def test_a_padded_plan_holds_the_plain_one_and_nothing_else(contexts: list[int], window: int | None) -> None:
    spans = [Span(index, 1, context) for index, context in enumerate(contexts)]
    tables = [np.arange(1, 2 + context // 16, dtype=np.int32) for context in contexts]
    plain = plan_decode(spans, tables, SHAPE, window, H100)
    padded = plan_decode(spans, tables, SHAPE, window, H100, padded=True)
    assert padded.tokens == padded.end_token == room(len(contexts))
    assert padded.items >= plain.items
    width = room_of_tables(max(map(len, tables)))
    assert padded.ints.tolist()[1] == width

    def rows(array: mx.array, columns: int) -> list[list[int]]:
        flat = np.array(array)
        return flat[: len(flat) // columns * columns].reshape(-1, columns).tolist()

    for name, columns in (("work", 8), ("reduce", 4)):
        have, more = rows(getattr(plain, name), columns), rows(getattr(padded, name), columns)
        real = plain.items if name == "work" else len(contexts)
        assert more[:real] == have[:real]
        assert not any(map(any, more[real:]))
    for table, row in zip(tables, rows(padded.tables, width), strict=False):
        assert row[: len(table)] == table.tolist()
        assert not any(row[len(table) :])


def test_a_plan_of_several_rows_for_a_sequence_is_not_padded() -> None:
    with pytest.raises(ValueError, match="one token each"):
        plan_decode([Span(0, 2, 8)], [np.arange(1, dtype=np.int32)], SHAPE, None, H100, padded=True)


@given(st.integers(1, 100_000))
def test_room_is_near(count: int) -> None:
    assert count <= room(count) < 2 * count or count == 1
    assert room(room(count)) == room(count)
