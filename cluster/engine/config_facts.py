"""Reads the facts that `admission` judges out of vLLM's configuration: the one place that knows its field names.

A field that a new vLLM renames fails here with AttributeError at start, not in the middle of serving.
"""

import sys

from vllm.config import AttentionConfig, KernelConfig, ModelConfig, ParallelConfig, VllmConfig

from pomarium.cluster.engine.admission import EngineFacts
from pomarium.cluster.engine.model_registry import REFUSED_MULTIMODAL
from pomarium.cluster.node.worker_environment import RESOURCE
from pomarium.worker.device import Device
from pomarium.worker.settings import Settings
from pomarium.worker.vision.families import SEEING


def extract(config: VllmConfig, settings: Settings, device: Device) -> EngineFacts:
    """Facts of `config` on this machine."""
    cache, offload = config.cache_config, config.offload_config
    in_ray_worker, holds_device = ray_surroundings()
    events = config.kv_events_config
    parallel = config.parallel_config
    model = config.model_config
    return EngineFacts(
        device=device.kind,
        device_dtypes=device.supported_dtypes,
        paged_attention=settings.paged_attention,
        multimodal_mode=settings.multimodal_mode,
        backend=backend_name(parallel),
        in_ray_worker=in_ray_worker,
        holds_device=holds_device,
        tensor_parallel_size=parallel.tensor_parallel_size,
        pipeline_parallel_size=parallel.pipeline_parallel_size,
        data_parallel_size=parallel.data_parallel_size,
        prefill_context_parallel_size=parallel.prefill_context_parallel_size,
        decode_context_parallel_size=parallel.decode_context_parallel_size,
        nnodes=parallel.nnodes,
        enable_expert_parallel=parallel.enable_expert_parallel,
        enable_elastic_ep=parallel.enable_elastic_ep,
        use_ubatching=parallel.use_ubatching,
        device_ids=_tuple_or_none(parallel.assigned_physical_gpu_ids),
        architectures=tuple(model.architectures),
        runner_type=model.runner_type,
        is_multimodal=_multimodal(model),
        is_encoder_decoder=model.is_encoder_decoder,
        is_diffusion=model.is_diffusion,
        has_inner_state=model.has_inner_state,
        dtype=str(model.dtype).removeprefix("torch."),
        model_impl=str(model.model_impl),
        config_format=str(model.config_format),
        hf_config_path=model.hf_config_path,
        hf_overrides=_override_keys(model),
        enable_prompt_embeds=model.enable_prompt_embeds,
        enable_sleep_mode=model.enable_sleep_mode,
        enable_return_routed_experts=model.enable_return_routed_experts,
        return_sampling_mask=model.return_sampling_mask,
        enable_trace_replay=model.enable_trace_replay,
        load_format=str(config.load_config.load_format),
        block_size=cache.block_size,
        cache_laid_out=cache.num_gpu_blocks is not None,
        cache_dtype=cache.cache_dtype,
        kv_offloading=cache.kv_offloading_size is not None,
        kv_sharing_fast_prefill=cache.kv_sharing_fast_prefill,
        mamba_cache_dtypes=(cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype),
        cpu_offload_gb=offload.uva.cpu_offload_gb,
        prefetch_offload=offload.prefetch.offload_group_size > 0,
        lora=config.lora_config is not None,
        speculative=config.speculative_config is not None,
        kv_connector=config.kv_transfer_config is not None,
        ec_connector=config.ec_transfer_config is not None,
        weight_transfer=config.weight_transfer_config is not None,
        kv_events_endpoint=events.endpoint if events is not None and events.enable_kv_cache_events else None,
        profiler=config.profiler_config.profiler,
        layerwise_tracing=config.observability_config.enable_layerwise_nvtx_tracing,
        default_attention=_default_attention(config.attention_config),
        default_kernels=_default_kernels(config.kernel_config),
    )


def _multimodal(model: ModelConfig) -> bool:
    """Whether it takes what is not computed; of a family that sees, images/sight.py has settled that."""
    if not SEEING.keys().isdisjoint(model.architectures):
        return False
    return bool(model.is_multimodal_model) or not REFUSED_MULTIMODAL.isdisjoint(model.architectures)


def backend_name(parallel: ParallelConfig) -> str:
    """`distributed_executor_backend` as text."""
    backend = parallel.distributed_executor_backend
    return f"{backend.__module__}.{backend.__qualname__}" if isinstance(backend, type) else str(backend)


def ray_surroundings() -> tuple[bool, bool]:
    """(this process is a Ray actor or task, that actor or task holds the resource `mlx`)."""
    if "ray" not in sys.modules:  # then it is not initialised either, and importing it would cost a second
        return False, False
    import ray

    if not ray.is_initialized():
        return False, False
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE:
        return False, False
    return True, context.get_assigned_resources().get(RESOURCE, 0) > 0


def _tuple_or_none(values: list[int] | None) -> tuple[int, ...] | None:
    return None if values is None else tuple(values)


def _override_keys(model: ModelConfig) -> tuple[str, ...]:
    return ("<callable>",) if callable(model.hf_overrides) else tuple(model.hf_overrides)


def _default_attention(attention: AttentionConfig) -> bool:
    return attention.backend is None and not attention.backend_per_kind and not attention.use_non_causal


def _default_kernels(kernel: KernelConfig) -> bool:
    return (str(kernel.moe_backend), str(kernel.linear_backend)) == ("auto", "auto")
