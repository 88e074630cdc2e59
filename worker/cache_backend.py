"""A worker's cache: pools of K and V and of states, and the attention over them.

CacheLayout, StateLayout --cache_backend--> PagedPool, state pools --> AttentionBackend
"""

import logging

import mlx.core as mx

from pomarium.worker.attention.base import AttentionBackend
from pomarium.worker.attention.choose import attention_backend, launcher_of, pool_of
from pomarium.worker.device import Device
from pomarium.worker.kv_cache.layout import CacheLayout
from pomarium.worker.kv_cache.states import StateLayout
from pomarium.worker.models.gated_delta_kernels import with_states
from pomarium.worker.settings import Settings

logger = logging.getLogger(__name__)


def cache_backend(
    layout: CacheLayout, states: StateLayout | None, dtype: mx.Dtype, device: Device, settings: Settings
) -> AttentionBackend:
    """Allocate the pools, and choose what attends over them.

    Args:
        states: of gated-delta layers; None without any. dtype: of K and V.
    """
    pool = pool_of(layout, dtype, device)
    logger.info("KV pool: %d blocks, %d MiB", pool.layout.num_blocks, pool.nbytes >> 20)
    attention = attention_backend(pool, device, mla_kernel=settings.mla_kernel)
    if settings.debug:
        logger.info("attention path: %s", type(attention).__name__)
    if states is None:
        return attention
    launcher = launcher_of(device) if settings.gdn_lazy_kernels else None
    return with_states(attention, states, launcher)
