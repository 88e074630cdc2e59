"""Which attention backend a device and a model take, and whether their decode steps have graphs."""

import mlx.core as mx

from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs, RowsModel
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.hybrid import HybridBackend
from pomarium.worker.attention.kernels import KernelAttention, paged_pool
from pomarium.worker.attention.mla import LatentKernelAttention
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.kv_cache.layout import CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool


def launcher_of(device: Device) -> Launcher | None:
    """What runs kernels on `device`; None on the CPU."""
    if device.backend is None:
        return None
    return MetalLauncher() if device.backend is GpuBackend.METAL else CudaLauncher()


def pool_of(layout: CacheLayout, dtype: mx.Dtype, device: Device) -> PagedPool:
    """A pool for `attention_backend`: zeroed, but for what kernels write and read."""
    launcher = launcher_of(device)
    return PagedPool(layout, dtype) if launcher is None else paged_pool(layout, dtype, launcher)


def attention_backend(pool: PagedPool, device: Device, *, mla_kernel: bool) -> AttentionBackend:
    """MLX operations on the CPU; on a GPU kernels, for latents only if `mla_kernel` (VLLM_METAL_MLA_KERNEL)."""
    launcher = launcher_of(device)
    if launcher is None:
        return GatheredAttention(pool)
    if any(layer.latent for layer in pool.layout.layers):
        return LatentKernelAttention(pool, launcher, this_gpu()) if mla_kernel else GatheredAttention(pool)
    return KernelAttention(pool, launcher, this_gpu())


def decode_graphs(model: RowsModel, backend: AttentionBackend) -> DecodeGraphs | None:
    """Graphs of `model`'s decode steps, where kernels take all of its layers; else None."""
    attention, states = backend, None
    if isinstance(backend, HybridBackend):
        attention, states = backend.attention, backend.states.in_graphs
        if states is None:
            return None
    return (
        DecodeGraphs(model, attention, states) if isinstance(attention, KernelAttention) and attention.whole else None
    )
