"""A tiny latent-attention model served through the emulated kernel gives the tokens of the MLX-operation path."""

import logging
import re
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from emulator.counting import CountingLauncher
from equality import BOUND, check_tokens, logit_error, reference
from step_driver import Driver
from tiny_models import build

from pomarium.kernels import mla
from pomarium.kernels.gpu_family import H100
from pomarium.kernels.reference import Scoring
from pomarium.worker.attention.choose import attention_backend
from pomarium.worker.attention.decode_graphs import DecodeGraphs
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.device import Device, DeviceKind, GpuBackend
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import LayerCache, single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.paged import PagedModel, prepare

LAYERS, NEW_TOKENS = 2, 6
LENGTHS = {"one": 1, "short": 5, "block": 16, "long": 43}


@cache
def model() -> PagedModel:
    wide = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "num_hidden_layers": LAYERS}
    return prepare(build("deepseek_v3", **wide), "deepseek_v3")


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(3, 120, length).tolist() for name, length in LENGTHS.items()}


TUNINGS = {
    "mla_decode": mla.Tuning(matrices=False, heads=4, simdgroups=8, threadgroups=2, tokens=16),
    "mla_decode_matrix": mla.Tuning(matrices=True, heads=2, simdgroups=8, threadgroups=4, tokens=16),
}


@pytest.mark.parametrize("kernel", TUNINGS)
def test_the_kernel_gives_mlx_lm_s_tokens(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks while others decode already: each row of one goes to the kernel, and no other."""
    monkeypatch.setattr(mla, "TUNINGS", {H100.family: TUNINGS[kernel]})
    driver, launcher = Driver(model(), block_size=16, num_blocks=64), CountingLauncher()
    pool = PagedPool(driver.layout, model().dtype)
    driver.recorder.inner = PagedForward(model(), LatentKernelAttention(pool, launcher, H100))
    tokens = driver.run(prompts(), NEW_TOKENS, chunks=(7, 1, 16, 50))
    for request, prompt in prompts().items():
        want = reference(model().module, prompt, NEW_TOKENS)
        shared = check_tokens(tokens[request], want)
        compared = len(prompt) if shared else len(want.logits)
        got = np.stack([driver.recorder.logits[request][position] for position in range(compared)])
        assert logit_error(got, want.logits[:compared]) < BOUND
    assert set(launcher.launches) == {kernel, "mla_reduce", "reshape_and_cache"}
    decoded = [rows for name, rows in launcher.rows if name == kernel]
    assert sum(decoded) >= LAYERS * len(LENGTHS) * (NEW_TOKENS - 1)
    assert {1, len(LENGTHS)} < set(decoded)


@pytest.mark.parametrize("kernel", TUNINGS)
def test_decode_steps_as_graphs_with_late_tokens_change_nothing(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded to buckets; a trace keeps the function of its first step (test_decode_graphs.py). One is preempted."""
    monkeypatch.setattr(mla, "TUNINGS", {H100.family: TUNINGS[kernel]})
    own = dict(list(prompts().items())[:3])

    def preempt(step: int) -> list[str]:
        return ["short"] if step == 4 else []

    want = Driver(model(), block_size=16, num_blocks=64)
    tokens = want.run(own, NEW_TOKENS, chunks=(7, 1, 16, 50), preempt=preempt)
    driver = Driver(model(), block_size=16, num_blocks=64, late=True)
    backend = LatentKernelAttention(PagedPool(driver.layout, model().dtype), CountingLauncher(), H100)
    graphs = DecodeGraphs(model(), backend.in_graphs, lambda graph: graph)
    driver.recorder.inner = PagedForward(model(), backend, graphs, queues=True)
    assert driver.run(own, NEW_TOKENS, chunks=(7, 1, 16, 50), preempt=preempt) == tokens
    assert graphs.traced >= 2
    for request, rows in want.recorder.logits.items():
        for position, row in rows.items():
            assert np.abs(driver.recorder.logits[request][position] - row).max() <= BOUND * np.abs(row).max()


def test_a_row_that_pads_a_step_is_stored_nowhere() -> None:
    """Three sequences in a bucket of four: what no sequence owns keeps its zeros."""
    layout = single_group_layout([LayerCache(1, 576, None, 512, latent=True)], 16, 9)
    pool = PagedPool(layout, mx.float32)
    backend = LatentKernelAttention(pool, CountingLauncher(), H100)
    step = batch((0, 1, (7,)), (3, 1, (4,)), (16, 1, (5, 1)))
    backend.prepare(step).attend_latents(0, mx.zeros((3, 3, 576)), mx.zeros((3, 576)), 512, Scoring(0.06))
    graphs = backend.in_graphs
    found = graphs.bucket(step, 4)
    assert found is not None
    branches = [ordered.branch(ordered.token) for ordered in graphs.ordered]
    given = graphs.step(4, *found, branches)
    out = given.attend_latents(0, mx.ones((4, 3, 576)), mx.ones((4, 576)), 512, Scoring(0.06))
    mx.eval(out, [branch.arrays for branch in branches])
    written = np.flatnonzero(np.array(pool.latents(0)).any(axis=1)).tolist()
    assert written == sorted([7 * 16, 4 * 16 + 3, 1 * 16])


def batch(*spans: tuple[int, int, tuple[int, ...]]) -> Batch:
    """Of sequences with tokens cached before, rows, and blocks."""
    sequences = tuple(Sequence(str(index), start, rows, (blocks,)) for index, (start, rows, blocks) in enumerate(spans))
    positions = np.concatenate([np.arange(start, start + rows, dtype=np.int32) for start, rows, _ in spans])
    every = np.arange(len(positions), dtype=np.int32)
    return Batch(sequences, every, positions, every, every, (), {})


def test_decode_rows_of_a_mixed_step_take_the_kernel() -> None:
    """Two sequences of one row on both sides of a prompt chunk; the chunk's rows are left to operations."""
    launcher, rng = CountingLauncher(), np.random.default_rng(0)
    layout = single_group_layout([LayerCache(1, 576, None, 512, latent=True)], 16, 9)
    kernel = LatentKernelAttention(PagedPool(layout, mx.float32), launcher, H100)
    operations = GatheredAttention(PagedPool(layout, mx.float32))
    before = batch((0, 20, (7, 2)), (0, 18, (4, 0)), (0, 32, (5, 1)))
    mixed = batch((20, 1, (7, 2)), (18, 9, (4, 0)), (32, 1, (5, 1, 8)))
    for step, decoded in ((before, []), (mixed, [2])):
        rows = len(step.positions)
        queries = mx.array(rng.standard_normal((rows, 3, 576), np.float32))
        latents = mx.array(rng.standard_normal((rows, 576), np.float32))
        got, want = (
            attention.prepare(step).attend_latents(0, queries, latents, 512, Scoring(0.06))
            for attention in (kernel, operations)
        )
        np.testing.assert_allclose(np.array(got), np.array(want), atol=4e-6)
        assert [rows for name, rows in launcher.rows if name.startswith("mla_decode")] == decoded


@pytest.mark.parametrize(("blocks", "named"), [((2, 9), 9), ((-3, 2), -3)])
def test_a_block_table_that_leaves_the_pool_is_refused(blocks: tuple[int, ...], named: int) -> None:
    launcher = CountingLauncher()
    layout = single_group_layout([LayerCache(1, 576, None, 512, latent=True)], 16, 9)
    backend = LatentKernelAttention(PagedPool(layout, mx.float32), launcher, H100)
    with pytest.raises(ValueError, match=rf"names block {named} .*outside a pool of 9"):
        backend.prepare(batch((20, 1, blocks)))
    assert launcher.rows == []


@pytest.mark.parametrize(
    ("layers", "block_size", "reason"),
    [
        ((LayerCache(1, 576, None, 512, latent=True),), 8, r"blocks of 8 tokens \(it takes 16, 32\)"),
        ((LayerCache(1, 320, None, 256, latent=True),), 16, r"latents of 256 \+ 64 elements"),
        ((LayerCache(2, 16), LayerCache(1, 576, None, 512, latent=True)), 16, "layers that keep no latents"),
    ],
)
def test_what_the_kernel_does_not_take_is_left_to_operations(
    layers: tuple[LayerCache, ...], block_size: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    pool = PagedPool(single_group_layout(layers, block_size, 4), mx.float32)
    device = Device(DeviceKind.GPU, GpuBackend.CUDA, "some device", ("float32",))
    with caplog.at_level(logging.INFO, "pomarium"):
        assert type(attention_backend(pool, device, mla_kernel=True)) is GatheredAttention
    assert re.search(reason, caplog.text)
    with pytest.raises(ValueError, match=reason):
        LatentKernelAttention(pool, CountingLauncher(), H100)
