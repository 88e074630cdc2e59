"""Each rule of admission refuses what it names and says what to change; a plain engine is admitted."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.engine.admission import BLOCK_SIZES, RULES, Backend, EngineFacts, admit, choose_backend
from pomarium.worker.errors import UnsupportedError
from pomarium.worker.settings import DeviceKind, MultimodalMode

PLAIN = EngineFacts(architectures=("LlamaForCausalLM",))
RACK_EXECUTOR = "pomarium.cluster.executor.rack_executor.RackExecutor"

REFUSED = {
    "tensor parallel": ({"tensor_parallel_size": 2}, "--tensor-parallel-size 1"),
    "stages without paging": (
        {"pipeline_parallel_size": 2, "paged_attention": False},
        "VLLM_METAL_USE_PAGED_ATTENTION=0",
    ),
    "stages of an actor with a device": ({"pipeline_parallel_size": 2, "holds_device": True}, "give none"),
    "data parallel": ({"data_parallel_size": 2}, "pomarium serve --replicas"),
    "prefill context": ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size"),
    "decode context": ({"decode_context_parallel_size": 2}, "--decode-context-parallel-size"),
    "expert parallel": ({"enable_expert_parallel": True}, "--enable-expert-parallel"),
    "elastic experts": ({"enable_elastic_ep": True}, "--enable-elastic-ep"),
    "micro-batches": ({"use_ubatching": True}, "--enable-dbo"),
    "nodes": ({"nnodes": 2}, "--nnodes"),
    "device ids": ({"device_ids": (0,)}, "--device-ids"),
    "external launcher": ({"backend": "external_launcher"}, "--distributed-executor-backend"),
    "mp outside Ray": ({"backend": "mp"}, "uni"),
    "pooling": ({"runner_type": "pooling"}, "--runner generate"),
    "encoder-decoder": ({"is_encoder_decoder": True}, "decoder-only"),
    "diffusion": ({"is_diffusion": True}, "another model"),
    "multimodal": ({"is_multimodal": True}, "text-only checkpoint"),
    "a wrapper whose images are wanted": (
        {"architectures": ("Gemma4ForConditionalGeneration",), "multimodal_mode": MultimodalMode.NATIVE},
        "auto or text-only-compat",
    ),
    "multimodal native": (
        {"is_multimodal": True, "multimodal_mode": MultimodalMode.NATIVE},
        "VLLM_METAL_MULTIMODAL_MODE=multimodal-native",
    ),
    "bfloat16 on the CPU": ({"dtype": "bfloat16"}, "--dtype auto"),
    "transformers backend": ({"model_impl": "transformers"}, "--model-impl auto"),
    "mistral format": ({"config_format": "mistral"}, "--config-format hf"),
    "dummy weights": ({"load_format": "dummy"}, "--load-format auto"),
    "overrides": ({"hf_overrides": ("rope_scaling",)}, "--hf-overrides"),
    "override function": ({"hf_overrides": ("<callable>",)}, "--hf-overrides"),
    "foreign config": ({"hf_config_path": "elsewhere"}, "--hf-config-path"),
    "prompt embeddings": ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
    "sleep": ({"enable_sleep_mode": True}, "--enable-sleep-mode"),
    "routed experts": ({"enable_return_routed_experts": True}, "--enable-return-routed-experts"),
    "sampling mask": ({"return_sampling_mask": True}, "--return-sampling-mask"),
    "trace replay": ({"enable_trace_replay": True}, "--enable-trace-replay"),
    "block size": ({"block_size": 64}, "--block-size to 8, 16 or 32"),
    "fp8 cache": ({"cache_dtype": "fp8"}, "--kv-cache-dtype auto"),
    "bfloat16 cache of a float32 model": ({"cache_dtype": "bfloat16"}, "--kv-cache-dtype auto"),
    "KV offloading": ({"kv_offloading": True}, "--kv-offloading-size"),
    "weight offloading": ({"cpu_offload_gb": 1.0}, "--cpu-offload-gb"),
    "prefetch offloading": ({"prefetch_offload": True}, "--offload-group-size"),
    "shared K/V": ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    "state dtype": ({"mamba_cache_dtypes": ("auto", "float16")}, "--mamba-ssm-cache-dtype"),
    "recurrent layers": ({"has_inner_state": True}, "attention-only"),
    "KV connector": ({"kv_connector": True}, "--kv-transfer-config"),
    "encoder connector": ({"ec_connector": True}, "--ec-transfer-config"),
    "open KV events": ({"kv_events_endpoint": "tcp://*:5557"}, "tcp://127.0.0.1:5557"),
    "LoRA": ({"lora": True}, "--enable-lora"),
    "speculative": ({"speculative": True}, "--speculative-config"),
    "weight transfer": ({"weight_transfer": True}, "--weight-transfer-config"),
    "profiler": ({"profiler": "torch"}, "--profiler-config"),
    "tracing": ({"layerwise_tracing": True}, "--enable-layerwise-nvtx-tracing"),
    "attention backend": ({"default_attention": False}, "--attention-backend"),
    "kernels": ({"default_kernels": False}, "--moe-backend"),
}


def test_a_plain_engine_is_admitted() -> None:
    assert admit(PLAIN) is None


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_what_to_change(name: str) -> None:
    changes, cure = REFUSED[name]
    error = admit(dataclasses.replace(PLAIN, **changes))
    assert isinstance(error, UnsupportedError)
    sentence = str(error)
    assert cure in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_every_rule_is_broken_by_exactly_the_cases_that_name_it() -> None:
    broken = {
        index
        for changes, _ in REFUSED.values()
        for index, rule in enumerate(RULES)
        if rule.broken(dataclasses.replace(PLAIN, **changes))
    }
    assert broken == set(range(len(RULES)))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_supported_block_sizes(block_size: int) -> None:
    assert admit(dataclasses.replace(PLAIN, block_size=block_size)) is None


def test_what_vllm_made_of_the_block_size_is_admitted() -> None:
    """A hybrid's blocks are as large as a state, and an engine in a process of its own is admitted after that."""
    assert admit(dataclasses.replace(PLAIN, block_size=1056, cache_laid_out=True)) is None


def test_half_precision_is_the_gpus() -> None:
    gpu = {"device": DeviceKind.GPU, "device_dtypes": ("bfloat16", "float16", "float32")}
    assert admit(dataclasses.replace(PLAIN, dtype="bfloat16", cache_dtype="bfloat16", **gpu)) is None


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5557", "tcp://localhost:1", "ipc:///tmp/x", "tcp://[::1]:5"])
def test_kv_events_on_loopback_are_admitted(endpoint: str) -> None:
    assert admit(dataclasses.replace(PLAIN, kv_events_endpoint=endpoint)) is None


def test_architecture_override_is_admitted() -> None:
    assert admit(dataclasses.replace(PLAIN, hf_overrides=("architectures",))) is None


@pytest.mark.parametrize(
    ("backend", "in_ray_worker", "holds_device", "expected"),
    [
        ("uni", False, False, Backend.UNIPROC),  # vllm.LLM(DIR), vllm serve DIR
        ("ray", False, False, Backend.RACK),
        ("ray", True, True, Backend.RACK),
        (RACK_EXECUTOR, False, False, Backend.RACK),
        ("mp", True, False, Backend.RACK),  # Ray Serve LLM
        ("uni", True, False, Backend.RACK),
        ("uni", True, True, Backend.UNIPROC),  # an actor that reserved its own device
    ],
)
def test_where_the_worker_goes(backend: str, in_ray_worker: bool, holds_device: bool, expected: Backend) -> None:
    facts = dataclasses.replace(PLAIN, backend=backend, in_ray_worker=in_ray_worker, holds_device=holds_device)
    assert choose_backend(facts) is expected
    assert admit(facts) is None


@given(sizes=st.tuples(*[st.integers(1, 4)] * 3))
def test_stages_are_the_only_parallelism_within_an_engine(sizes: tuple[int, int, int]) -> None:
    tensor, pipeline, data = sizes
    facts = dataclasses.replace(
        PLAIN, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, data_parallel_size=data
    )
    assert (admit(facts) is None) == (tensor == data == 1)
    assert choose_backend(facts) is (Backend.RACK if pipeline > 1 else Backend.UNIPROC)
