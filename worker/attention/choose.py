"""Which attention backend a device and a model take, and whether their decode steps have graphs."""

import logging

import mlx.core as mx

from pomarium.kernels.gpu_family import this_gpu
from pomarium.kernels.launch import CudaLauncher, Launcher, MetalLauncher
from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.decode_graphs import DecodeGraphs, RowsModel
from pomarium.worker.attention.gathered import GatheredAttention
from pomarium.worker.attention.kernels import KernelAttention, paged_pool
from pomarium.worker.attention.mla import LatentKernelAttention, refusal
from pomarium.worker.device import Device, GpuBackend
from pomarium.worker.kv_cache.layout import CacheLayout
from pomarium.worker.kv_cache.pool import PagedPool

logger = logging.getLogger(__name__)


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
    if not any(layer.latent for layer in pool.layout.layers):
        return KernelAttention(pool, launcher, this_gpu())
    if mla_kernel and (reason := refusal(pool)) is None:
        return LatentKernelAttention(pool, launcher, this_gpu())
    if mla_kernel:
        logger.info("latent attention runs as MLX operations: no kernel takes %s", reason)
    return GatheredAttention(pool)


def decode_graphs(model: RowsModel, backend: AttentionBackend) -> DecodeGraphs | None:
    """Graphs of `model`'s decode steps, where kernels take all of its layers; else None."""
    attention = backend.in_graphs
    return None if attention is None else DecodeGraphs(model, attention)
