"""Tiny models served through the emulated attention kernels give the tokens of the MLX-operation path."""

import logging
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from emulator.counting import CountingLauncher
from equality import BOUND
from step_driver import Driver
from tiny_models import TINY, build
from wrapper_models import build_text

from pomarium.kernels.gpu_family import H100, Family, Gpu
from pomarium.worker.attention.choose import attention_backend
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.kernels import KernelAttention, group_rows, paged_pool, row_slots
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.batch import Batch, Sequence
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.forward import PagedForward
from pomarium.worker.kv_cache.layout import CacheGroup, LayerCache, single_group_layout
from pomarium.worker.kv_cache.pool import PagedPool
from pomarium.worker.models.paged import PagedModel, prepare
from pomarium.worker.settings import DeviceKind

LENGTHS = {"one": 1, "short": 5, "block": 16, "long": 43}
KERNELS = {
    "unset", "reshape_and_cache", "paged_attention_decode", "paged_attention_reduce", "paged_attention_prefill",
}  # fmt: skip
NEW_TOKENS, STEPS = 4, 8
CHUNKS = (7, 1, 16, 50)


@cache
def model(name: str, head_dim: int = 64) -> PagedModel:
    return prepare(build(name, head_dim=head_dim), TINY[name]["model_type"])


def prompts() -> dict[str, list[int]]:
    rng = np.random.default_rng(0)
    return {name: rng.integers(3, 120, length).tolist() for name, length in LENGTHS.items()}


def through_kernels(paged: PagedModel, launcher: CountingLauncher, gpu: Gpu) -> Driver:
    driver = Driver(paged, block_size=8)
    # The emulator fills what a kernel leaves unset with not-a-numbers, and so the pool.
    pool = paged_pool(driver.layout, paged.dtype, launcher)
    driver.recorder.inner = PagedForward(paged, KernelAttention(pool, launcher, gpu))
    return driver


@pytest.mark.parametrize(
    ("name", "gpu"),
    [("llama", Gpu(Family.APPLE, 4)), ("gpt_oss", Gpu(Family.APPLE, 1)), ("gemma2", H100)],
    ids=["llama", "gpt_oss: windows and sinks", "gemma2: soft-cap"],
)
def test_the_kernels_give_the_operations_tokens(name: str, gpu: Gpu) -> None:
    """Prompts of four lengths in chunks, beside decoding sequences, one of them preempted."""
    assert launches_with_equal_results(model(name), gpu, BOUND).launches.keys() == KERNELS


@pytest.mark.parametrize(("name", "writers"), [("gemma4_small", 4), ("gemma4_dense", 6)])
def test_layers_that_share_keys_and_values_and_heads_of_two_sizes(name: str, writers: int) -> None:
    """Gemma 4. Layers that share K and V read them where their owner has written them.

    Its scores are products of normed vectors without a factor, 8 to 11 times as large as elsewhere at these head sizes,
    and so is their rounding: the bound is that much wider.
    """
    paged = prepare(build_text(name, head_dim=64, global_head_dim=128), "gemma4_text")
    launcher = launches_with_equal_results(paged, Gpu(Family.APPLE, 4), 8 * BOUND)
    assert launcher.launches.keys() == KERNELS
    assert launcher.stores == writers * STEPS


def launches_with_equal_results(paged: PagedModel, gpu: Gpu, bound: float) -> CountingLauncher:
    """Serve through MLX operations and through kernels: the same tokens, and logits within `bound` of the largest."""
    launcher = CountingLauncher()
    want = Driver(paged, block_size=8)
    got = through_kernels(paged, launcher, gpu)

    def preempt(step: int) -> list[str]:
        return ["block"] if step == 4 else []

    tokens = want.run(prompts(), NEW_TOKENS, chunks=CHUNKS, preempt=preempt)
    assert got.run(prompts(), NEW_TOKENS, chunks=CHUNKS, preempt=preempt) == tokens
    for request, logits in want.recorder.logits.items():
        for position, row in logits.items():
            scale = np.abs(row).max()
            assert np.abs(got.recorder.logits[request][position] - row).max() / scale < bound
    return launcher


def test_a_shape_that_the_kernels_do_not_take_goes_to_operations_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    launcher = CountingLauncher()
    with caplog.at_level(logging.INFO, "pomarium"):
        got = through_kernels(model("llama", 8), launcher, H100)
        tokens = got.run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    assert tokens == Driver(model("llama", 8), block_size=8).run(prompts(), NEW_TOKENS, chunks=CHUNKS)
    assert not launcher.launches
    lines = [record.getMessage() for record in caplog.records if "MLX operations" in record.getMessage()]
    assert lines == [
        "attention of some layers is left to MLX operations: head size 8 is not one of 64, 80, 96, 112, 128, 192, "
        "256, 512 (4 layers from 0)"
    ]


def test_a_pool_is_unset_where_kernels_read_it_and_zeroed_where_operations_do() -> None:
    """Operations copy whole blocks and give what is too much no weight: not-a-numbers there would spread."""
    layout = single_group_layout([LayerCache(2, 64), LayerCache(2, 8)], 8, 4)
    pool = paged_pool(layout, mx.float32, CountingLauncher())
    unset, zeroed = (pool.keys_and_values(layer) for layer in (0, 1))
    assert all(bool(mx.isnan(array).all()) for array in unset)
    assert all(bool((array == 0).all()) for array in zeroed)


def test_operations_over_an_unset_pool_would_give_no_number() -> None:
    """Why a pool is not unset everywhere, and what the kernels' tests over one rest on."""
    paged = model("llama")
    driver = Driver(paged, block_size=8)
    driver.recorder.inner = PagedForward(
        paged, GatheredAttention(paged_pool(driver.layout, paged.dtype, CountingLauncher()))
    )
    driver.run({"a": [5, 6, 7]}, 1)
    assert all(np.isnan(row).all() for row in driver.recorder.logits["a"].values())


@pytest.mark.parametrize("backend", [None, *GpuBackend])
def test_a_gpu_takes_the_kernels_and_the_cpu_operations(backend: GpuBackend | None) -> None:
    kind = DeviceKind.CPU if backend is None else DeviceKind.GPU
    device = Device(kind, backend, "some device", ("float32",))
    pool = PagedPool(single_group_layout([LayerCache(2, 64)], 8, 4), mx.float32)
    chosen = attention_backend(pool, device, mla_kernel=True)
    assert type(chosen) is (GatheredAttention if backend is None else KernelAttention)
    latent = PagedPool(single_group_layout([LayerCache(1, 576, None, 512, latent=True)], 16, 4), mx.float32)
    kernel = LatentKernelAttention if backend else GatheredAttention
    assert type(attention_backend(latent, device, mla_kernel=True)) is kernel
    assert type(attention_backend(latent, device, mla_kernel=False)) is GatheredAttention


def test_a_table_that_does_not_hold_its_sequence_is_refused_when_the_step_is_prepared() -> None:
    group = CacheGroup((0,), 8, None, 0)

    def batch(blocks: tuple[int, ...]) -> Batch:
        rows = np.arange(3, dtype=np.int32)
        return Batch((Sequence("r", 6, 3, (blocks,)),), rows, rows + 6, rows, rows, ("r",), {})

    def slots(blocks: tuple[int, ...]) -> list[int]:
        step = batch(blocks)
        return row_slots(group_rows(step, group), step.positions, group, 6).tolist()

    assert slots((5, 2)) == [46, 47, 16]
    with pytest.raises(ValueError, match=r"context of 9 tokens is longer than its block table: 1 blocks of 8"):
        slots((5,))
    with pytest.raises(ValueError, match=r"names block 6 at \[0, 1\], outside a pool of 6"):
        slots((5, 6))
