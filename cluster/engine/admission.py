"""Admits or refuses an engine configuration at start: pure rules over plain facts.

    VllmConfig + Settings --facts.extract--> EngineFacts --admit--> None, or the UnsupportedError to raise

Whatever is not refused here is either honoured by the worker or done by vLLM's engine in front of it. A refusal names
the reason and the flag to change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from pomarium.worker.errors import UnsupportedError
from pomarium.worker.models.wrappers import WRAPPERS
from pomarium.worker.settings import DeviceKind, MultimodalMode
from pomarium.worker.vision.families import SEEING

BLOCK_SIZES = (8, 16, 32)
LOAD_FORMATS = frozenset({"auto", "hf", "safetensors", "gguf"})
HYBRIDS = frozenset({"Qwen3NextForCausalLM", "Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"}) | {
    architecture for architecture, wrapper in WRAPPERS.items() if wrapper.hybrid
}
"""Architectures with gated-delta layers that the worker runs (worker.models.gated_delta)."""

_BLIND = WRAPPERS.keys() - SEEING.keys()
_SEEING_NAMES = " and ".join(SEEING)


class Backend(StrEnum):
    """Where the worker runs."""

    UNIPROC = "uni"
    """In the engine's process."""
    RACK = "rack"
    """In Ray actors, through RackExecutor."""


@dataclass(frozen=True)
class EngineFacts:
    """What the rules look at; names are vLLM's unless stated. Defaults are those of a plain `vllm serve DIR`.

    Attributes:
        backend: `distributed_executor_backend` as text; the qualified name if it is a class.
        in_ray_worker: the process is a Ray actor or task, such as a Serve replica.
        holds_device: that actor or task was itself given the resource `mlx`.
        device, device_dtypes: of the settings and the machine, dtypes preferred first.
        hf_overrides: keys of the overrides; "<callable>" for a function.
        cache_laid_out: vLLM has grouped the layers, and `block_size` is not what was asked for any more but what its
            groups got, such as 1056 in a hybrid; an engine in a process of its own is then admitted once more.
        kv_events_endpoint: None unless KV-cache events are published.
        default_attention, default_kernels: no backend was asked for by name.
    """

    device: DeviceKind = DeviceKind.CPU
    device_dtypes: tuple[str, ...] = ("float32",)
    paged_attention: bool = True
    multimodal_mode: MultimodalMode = MultimodalMode.AUTO

    backend: str = "uni"
    in_ray_worker: bool = False
    holds_device: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    prefill_context_parallel_size: int = 1
    decode_context_parallel_size: int = 1
    nnodes: int = 1
    enable_expert_parallel: bool = False
    enable_elastic_ep: bool = False
    use_ubatching: bool = False
    device_ids: tuple[int, ...] | None = None

    architectures: tuple[str, ...] = ()
    runner_type: str = "generate"
    is_multimodal: bool = False
    is_encoder_decoder: bool = False
    is_diffusion: bool = False
    has_inner_state: bool = False
    dtype: str = "float32"
    model_impl: str = "auto"
    config_format: str = "auto"
    hf_config_path: str | None = None
    hf_overrides: tuple[str, ...] = ()
    enable_prompt_embeds: bool = False
    enable_sleep_mode: bool = False
    enable_return_routed_experts: bool = False
    return_sampling_mask: bool = False
    enable_trace_replay: bool = False
    load_format: str = "auto"

    block_size: int = 16
    cache_laid_out: bool = False
    cache_dtype: str = "auto"
    kv_offloading: bool = False
    kv_sharing_fast_prefill: bool = False
    mamba_cache_dtypes: tuple[str, str] = ("auto", "auto")

    cpu_offload_gb: float = 0.0
    prefetch_offload: bool = False
    lora: bool = False
    speculative: bool = False
    kv_connector: bool = False
    ec_connector: bool = False
    weight_transfer: bool = False
    kv_events_endpoint: str | None = None
    profiler: str | None = None
    layerwise_tracing: bool = False
    default_attention: bool = True
    default_kernels: bool = True


@dataclass(frozen=True)
class Rule:
    """One reason to refuse.

    Attributes:
        broken: whether the facts break it.
        sentence: what is wrong and what to change.
    """

    broken: Callable[[EngineFacts], bool]
    sentence: Callable[[EngineFacts], str]


def _refuse_if(broken: Callable[[EngineFacts], bool], sentence: str | Callable[[EngineFacts], str]) -> Rule:
    return Rule(broken, sentence if callable(sentence) else lambda _: sentence)


def choose_backend(facts: EngineFacts) -> Backend:
    """Where the worker goes.

    "ray" means RackExecutor, and several stages always do. So does "mp" inside a Ray actor, for Ray Serve LLM forces it
    there, and "uni" in one that was not given a device of its own. All else runs in the engine's process.
    """
    if facts.backend not in ("uni", "mp") or facts.pipeline_parallel_size > 1:
        return Backend.RACK
    return Backend.RACK if facts.in_ray_worker and not facts.holds_device else Backend.UNIPROC


def admit(facts: EngineFacts) -> UnsupportedError | None:
    """The refusal of the first rule that `facts` break, None if they break none."""
    for rule in RULES:
        if rule.broken(facts):
            return UnsupportedError(rule.sentence(facts))
    return None


def _is_loopback(endpoint: str) -> bool:
    return endpoint.startswith(("tcp://127.", "tcp://localhost:", "tcp://[::1]:", "ipc://", "inproc://"))


_PARALLEL = (
    _refuse_if(
        lambda f: f.tensor_parallel_size > 1,
        lambda f: (
            f"tensor_parallel_size={f.tensor_parallel_size} is not supported: links between Macs are too slow to split "
            "each layer; set --tensor-parallel-size 1."
        ),
    ),
    _refuse_if(
        lambda f: f.pipeline_parallel_size > 1 and not f.paged_attention,
        "VLLM_METAL_USE_PAGED_ATTENTION=0 runs whole models only; leave it out, or set --pipeline-parallel-size 1.",
    ),
    _refuse_if(
        lambda f: f.pipeline_parallel_size > 1 and f.holds_device,
        "Stages are placed by Pomarium, each with the resource mlx of its Mac: give none to the actor or task that "
        "starts the engine.",
    ),
    _refuse_if(
        lambda f: f.data_parallel_size > 1,
        lambda f: (
            f"data_parallel_size={f.data_parallel_size} is not supported: replicas are Ray Serve's; "
            "use `pomarium serve --replicas` instead of --data-parallel-size."
        ),
    ),
    _refuse_if(
        lambda f: f.prefill_context_parallel_size > 1 or f.decode_context_parallel_size > 1,
        "Context parallelism is not supported: leave out --prefill-context-parallel-size and "
        "--decode-context-parallel-size.",
    ),
    _refuse_if(
        lambda f: f.enable_expert_parallel or f.enable_elastic_ep,
        "Expert parallelism is not supported: all experts of a layer run on one Mac; leave out "
        "--enable-expert-parallel and --enable-elastic-ep.",
    ),
    _refuse_if(
        lambda f: f.use_ubatching,
        "Dual-batch overlap is not supported: leave out --enable-dbo and --ubatch-size.",
    ),
    _refuse_if(
        lambda f: f.nnodes > 1,
        "nnodes > 1 is not supported: Ray places the workers; leave out --nnodes and --node-rank.",
    ),
    _refuse_if(
        lambda f: f.device_ids is not None,
        "Devices cannot be chosen by hand: Ray's resource mlx decides where a worker runs; leave out --device-ids.",
    ),
    _refuse_if(
        lambda f: f.backend == "external_launcher",
        "distributed_executor_backend=external_launcher is not supported; set --distributed-executor-backend to uni "
        "or ray.",
    ),
    _refuse_if(
        lambda f: f.backend == "mp" and not f.in_ray_worker and f.pipeline_parallel_size == 1,
        "distributed_executor_backend=mp is not supported outside Ray Serve: one worker needs no second process; set "
        "--distributed-executor-backend to uni (in the engine's process) or ray (an actor of its own).",
    ),
)

_MODEL = (
    _refuse_if(
        lambda f: f.runner_type != "generate",
        lambda f: (
            f"The {f.runner_type} runner (embeddings, scores, classes) is not supported, only text generation; "
            "serve a generative model, with --runner generate if it can be both."
        ),
    ),
    _refuse_if(
        lambda f: f.is_encoder_decoder,
        lambda f: f"Encoder-decoder models such as {f.architectures[0]} are not supported; serve a decoder-only model.",
    ),
    _refuse_if(
        lambda f: f.is_diffusion,
        lambda f: f"Diffusion language models such as {f.architectures[0]} are not supported; serve another model.",
    ),
    _refuse_if(
        lambda f: f.multimodal_mode is MultimodalMode.NATIVE and not _BLIND.isdisjoint(f.architectures),
        lambda f: (
            f"VLLM_METAL_MULTIMODAL_MODE=multimodal-native asks for images, which run for {_SEEING_NAMES} only; set it "
            f"to auto or text-only-compat, and {f.architectures[0]} is served as a text model."
        ),
    ),
    _refuse_if(
        lambda f: f.is_multimodal and f.multimodal_mode is MultimodalMode.NATIVE,
        lambda f: (
            f"VLLM_METAL_MULTIMODAL_MODE=multimodal-native asks for images, which run for {_SEEING_NAMES} only, not "
            f"for {f.architectures[0]}; serve one of these, or set it to auto and serve a text model."
        ),
    ),
    _refuse_if(
        lambda f: f.is_multimodal,
        lambda f: (
            f"{f.architectures[0]} is multimodal and not on the allowlist of models that are served as text "
            f"({', '.join(WRAPPERS)}); serve one of these or the text-only checkpoint of the family."
        ),
    ),
    _refuse_if(
        lambda f: f.dtype not in f.device_dtypes,
        lambda f: (
            f"dtype {f.dtype} does not run on the {f.device.value}, only {', '.join(f.device_dtypes)}; "
            "set --dtype auto."
        ),
    ),
    _refuse_if(
        lambda f: f.model_impl not in ("auto", "vllm"),
        lambda f: f"model_impl={f.model_impl} has no meaning here: models come from mlx-lm; set --model-impl auto.",
    ),
    _refuse_if(
        lambda f: f.config_format not in ("auto", "hf"),
        lambda f: (
            f"config_format={f.config_format} is not supported: the worker reads config.json; set --config-format hf."
        ),
    ),
    _refuse_if(
        lambda f: f.load_format not in LOAD_FORMATS,
        lambda f: (
            f"load_format={f.load_format} is not supported, only {', '.join(sorted(LOAD_FORMATS))}; "
            "set --load-format auto."
        ),
    ),
    _refuse_if(
        lambda f: f.hf_config_path is not None or bool(set(f.hf_overrides) - {"architectures"}),
        "The worker reads the model's own config.json, so a changed one would be half applied: leave out "
        "--hf-overrides and --hf-config-path and edit config.json.",
    ),
    _refuse_if(
        lambda f: f.enable_prompt_embeds,
        "Prompt embeddings are not supported: prompts are tokens; leave out --enable-prompt-embeds.",
    ),
    _refuse_if(
        lambda f: f.enable_sleep_mode,
        "Sleep mode is not supported: memory is shared with the system; leave out --enable-sleep-mode.",
    ),
    _refuse_if(
        lambda f: f.enable_return_routed_experts or f.return_sampling_mask or f.enable_trace_replay,
        "Reports of routed experts, sampling masks and traces are not supported: leave out "
        "--enable-return-routed-experts, --return-sampling-mask and --enable-trace-replay.",
    ),
)

_CACHE = (
    _refuse_if(
        lambda f: f.block_size not in BLOCK_SIZES and not f.cache_laid_out,
        lambda f: f"block_size={f.block_size} is not supported; set --block-size to 8, 16 or 32.",
    ),
    _refuse_if(
        lambda f: f.cache_dtype not in ("auto", f.dtype),
        lambda f: (
            f"kv_cache_dtype={f.cache_dtype} is not supported: keys and values keep the model's dtype ({f.dtype}); "
            "set --kv-cache-dtype auto."
        ),
    ),
    _refuse_if(
        lambda f: f.kv_offloading or f.cpu_offload_gb > 0 or f.prefetch_offload,
        "Offloading is not supported: the GPU shares the machine's memory, so there is nowhere to offload to; leave "
        "out --kv-offloading-size, --cpu-offload-gb and --offload-group-size.",
    ),
    _refuse_if(
        lambda f: f.kv_sharing_fast_prefill,
        "Fast prefill for shared K/V is not supported: leave out --kv-sharing-fast-prefill.",
    ),
    _refuse_if(
        # float32 is what they are kept in, and what some models' configs make vLLM ask for.
        lambda f: f.mamba_cache_dtypes not in (("auto", "auto"), ("auto", "float32")),
        "The dtype of recurrent state follows the model: leave out --mamba-cache-dtype and --mamba-ssm-cache-dtype.",
    ),
    _refuse_if(
        lambda f: f.has_inner_state and f.architectures[0] not in HYBRIDS,
        lambda f: (
            f"{f.architectures[0]} has recurrent layers, and of those only the gated-delta layers of Qwen3-Next and "
            "Qwen3.5 run; serve one of these or an attention-only model."
        ),
    ),
    _refuse_if(
        lambda f: f.kv_connector or f.ec_connector,
        "KV and encoder-cache connectors are not supported: leave out --kv-transfer-config and --ec-transfer-config.",
    ),
    _refuse_if(
        lambda f: f.kv_events_endpoint is not None and not _is_loopback(f.kv_events_endpoint),
        lambda f: (
            f"KV-cache events would be published to anyone who can reach {f.kv_events_endpoint}; "
            'set "endpoint" in --kv-events-config to a loopback address such as tcp://127.0.0.1:5557.'
        ),
    ),
)

_FEATURES = (
    _refuse_if(lambda f: f.lora, "LoRA is not supported: merge the adapter into the model, leave out --enable-lora."),
    _refuse_if(lambda f: f.speculative, "Speculative decoding is not supported: leave out --speculative-config."),
    _refuse_if(
        lambda f: f.weight_transfer,
        "Weight transfer from a trainer is not supported: leave out --weight-transfer-config.",
    ),
    _refuse_if(
        lambda f: f.profiler is not None or f.layerwise_tracing,
        "vLLM's profilers record torch, which computes nothing here: leave out --profiler-config and "
        "--enable-layerwise-nvtx-tracing.",
    ),
    _refuse_if(
        lambda f: not f.default_attention,
        "Attention runs on MLX, so vLLM's backends cannot be chosen: leave out --attention-backend and "
        "--attention-config.",
    ),
    _refuse_if(
        lambda f: not f.default_kernels,
        "Layers run on MLX, so vLLM's kernels cannot be chosen: leave out --moe-backend and --linear-backend.",
    ),
)

RULES: tuple[Rule, ...] = (*_PARALLEL, *_MODEL, *_CACHE, *_FEATURES)
