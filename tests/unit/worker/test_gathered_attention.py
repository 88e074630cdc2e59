"""Paged attention as MLX operations against float64 numpy, over scrambled blocks of a real pool."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.kv_cache.layout import CacheGroup, CacheLayout, LayerCache, single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool

HEAD_DIM = 16


def softmax_attention(q, k, v, start, scale, window, sinks, softcap):  # type: ignore[no-untyped-def]
    """(n, heads, d) queries from position `start` over (start + n, kv_heads, d) keys; float64."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = np.tanh(scores / softcap) * softcap
    query, key = start + np.arange(len(q))[:, None], np.arange(len(k))[None]
    seen = (key <= query) if window is None else (key <= query) & (key > query - window)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, np.asarray(sinks)[:, None, None])
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - top)
    return np.einsum("hqk,khd->qhd", weights / total, v)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=4),
    block_size=st.sampled_from([8, 16, 32]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (16, 1), (9, 3)]),
    value=st.sampled_from([None, 6, 24, "latent"]),
    window=st.none() | st.integers(1, 30),
    sinks=st.booleans(),
    softcap=st.none() | st.just(2.0),
    seed=st.integers(0, 99),
)
def test_attention_of_ragged_chunks_matches_numpy(
    steps: list[list[int]],
    block_size: int,
    heads: tuple[int, int],
    value: int | str | None,
    window: int | None,
    sinks: bool,
    softcap: float | None,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    latent = value == "latent"
    num_heads, kv_heads = (heads[0], 1) if latent else heads
    width = HEAD_DIM if value is None else 12 if latent else int(value)
    layers = (LayerCache(kv_heads, HEAD_DIM, window, width, latent),)
    pool = PagedPool(single_group_layout(layers, block_size, 100), mx.float32)
    backend = GatheredAttention(pool)
    free = rng.permutation(np.arange(1, 100)).tolist()
    tables: list[list[int]] = [[], [], []]
    keys = [np.zeros((0, kv_heads, HEAD_DIM), np.float32) for _ in tables]
    values = [np.zeros((0, kv_heads, width), np.float32) for _ in tables]
    sink = rng.normal(size=num_heads).astype(np.float32) if sinks else None
    for lengths in steps:
        if not any(lengths):
            continue
        sequences, positions, q_rows, k_rows, v_rows = [], [], [], [], []
        for index, length in enumerate(lengths):
            if length == 0:
                continue
            start = len(keys[index])
            while len(tables[index]) * block_size < start + length:
                tables[index].append(free.pop())
            q, k, v = (
                rng.normal(size=(length, count, columns)).astype(np.float32)
                for count, columns in ((num_heads, HEAD_DIM), (kv_heads, HEAD_DIM), (kv_heads, width))
            )
            v = k[..., :width] if latent else v
            keys[index], values[index] = np.concatenate([keys[index], k]), np.concatenate([values[index], v])
            sequences.append(Sequence(str(index), start, length, (tuple(tables[index]),)))
            positions.append(np.arange(start, start + length, dtype=np.int32))
            q_rows.append(q), k_rows.append(k), v_rows.append(v)
        rows = np.concatenate(positions)
        none = np.zeros(0, np.int32)
        batch = Batch(tuple(sequences), np.zeros_like(rows), rows, none, none, (), {})
        queries, new_keys, new_values = (mx.array(np.concatenate(part)) for part in (q_rows, k_rows, v_rows))
        scoring, step = Scoring(0.3, None if sink is None else mx.array(sink), softcap), backend.prepare(batch)
        if latent:
            out = step.attend_latents(0, queries, new_keys[:, 0], width, scoring)
        else:
            out = step.attend(0, queries, new_keys, new_values, scoring)
        mx.eval(out, backend.arrays)
        first = 0
        for sequence, q in zip(sequences, q_rows, strict=True):
            index = int(sequence.request_id)
            want = softmax_attention(q, keys[index], values[index], sequence.start, 0.3, window, sink, softcap)
            np.testing.assert_allclose(np.array(out[first : first + sequence.length]), want, atol=2e-5, rtol=2e-5)
            first += sequence.length


def test_groups_that_share_a_buffer_do_not_disturb_each_other() -> None:
    """vLLM lays layers of different groups over one buffer; their block ids differ."""
    layers = (LayerCache(2, HEAD_DIM), LayerCache(2, HEAD_DIM, 4))
    layout = CacheLayout(layers, (CacheGroup((0,), 8, None, 0), CacheGroup((1,), 8, 4, 1)), (0, 0), 10)
    pool = PagedPool(layout, mx.float32)
    backend = GatheredAttention(pool)
    rng = np.random.default_rng(0)
    k = [mx.array(rng.normal(size=(5, 2, HEAD_DIM)).astype(np.float32)) for _ in layers]
    batch = Batch((Sequence("a", 0, 5, ((3,), (7,))),), np.zeros(5, np.int32), np.arange(5, dtype=np.int32),
                  np.zeros(0, np.int32), np.zeros(0, np.int32), (), {})  # fmt: skip
    step = backend.prepare(batch)
    outs = [step.attend(layer, k[layer], k[layer], k[layer], Scoring(1.0)) for layer in (0, 1)]
    for layer, window in ((0, None), (1, 4)):
        array = np.array(k[layer])
        want = softmax_attention(array, array, array, 0, 1.0, window, None, None)
        np.testing.assert_allclose(np.array(outs[layer]), want, atol=2e-5)


def test_layers_of_unlike_shape_cannot_share_a_buffer() -> None:
    for other in (LayerCache(2, 8), LayerCache(2, 16, value_width=8), LayerCache(2, 16, latent=True)):
        with pytest.raises(ValueError, match="differ in shape"):
            CacheLayout((LayerCache(2, 16), other), (CacheGroup((0, 1), 8, None, 0),), (0, 0), 10)


def test_what_a_layer_keeps_is_what_the_pool_holds() -> None:
    kinds = (LayerCache(2, 16), LayerCache(4, 12, value_width=8), LayerCache(1, 20, value_width=16, latent=True))
    assert [layer.elements for layer in kinds] == [64, 80, 20]
    for layer in kinds:
        assert PagedPool(single_group_layout((layer,), 8, 3), mx.float32).nbytes == 3 * 8 * layer.elements * 4
    with pytest.raises(ValueError, match="hold no values"):
        LayerCache(1, 16, value_width=20, latent=True)


def test_a_step_writes_the_pool_in_place() -> None:
    """Peak memory of a step stays far below a second pool: a copy per layer would double it."""
    layers = (LayerCache(4, 64),) * 4
    before = mx.get_active_memory()
    pool = PagedPool(single_group_layout(layers, 16, 4096), mx.float32)
    backend = GatheredAttention(pool)
    new = mx.ones((3, 4, 64))
    sequences = tuple(Sequence(str(index), 0, 1, ((index + 1,),)) for index in range(3))
    batch = Batch(sequences, np.zeros(3, np.int32), np.zeros(3, np.int32), np.zeros(0, np.int32),
                  np.zeros(0, np.int32), (), {})  # fmt: skip
    mx.reset_peak_memory()
    for _ in range(3):
        step = backend.prepare(batch)
        mx.eval([step.attend(layer, new, new, new, Scoring(1.0)) for layer in range(4)], backend.arrays)
    assert mx.get_peak_memory() - before < pool.nbytes * 1.1
