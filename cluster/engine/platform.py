"""Pomarium's vLLM platform: reads the settings, admits or refuses the configuration, names worker and executor.

    vLLM --check_and_update_config(VllmConfig)--> settings.load --> facts.extract --> admission.admit --> config updated

vLLM calls it in the process that parses the arguments, before any engine or worker process exists and before weights
are read, so what it raises reaches the user as it is.
"""

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import psutil
import torch
import vllm.envs as envs
from vllm.logger import init_logger
from vllm.platforms.interface import Platform, PlatformEnum

from pomarium.cluster.engine.admission import Backend, EngineFacts, admit, choose_backend
from pomarium.cluster.engine.intake import defaults as intake_defaults
from pomarium.cluster.engine.intake import guard
from pomarium.cluster.node.worker_environment import RESOURCE, VISIBLE_DEVICES
from pomarium.cluster.provision.kernels import require_cpu_backend
from pomarium.worker import settings as worker_settings
from pomarium.worker.device import Device, detect
from pomarium.worker.errors import UnsupportedError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser

logger = init_logger("vllm.pomarium.platform")

WORKER_CLASS = "pomarium.cluster.engine.scheduling.timed_worker.TimedWorker"

_TORCH_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class PomariumPlatform(Platform):
    """MLX on Apple Silicon, or on the CPU elsewhere. To torch it is a CPU: tensors of vLLM's own stay there."""

    _enum = PlatformEnum.OOT
    device_name = "mlx"
    device_type = "cpu"
    dispatch_key = "CPU"
    ray_device_key = RESOURCE
    device_control_env_var = VISIBLE_DEVICES
    simple_compile_backend = "eager"

    @property
    def supported_dtypes(self) -> list[torch.dtype]:
        """Dtypes of the device, the one that `--dtype auto` falls back to first. Raises SettingsError."""
        device = detect(worker_settings.load(os.environ))
        return [_TORCH_DTYPES[name] for name in device.supported_dtypes]

    def is_cpu(self) -> bool:
        """Whether torch, too, has nothing but the CPU.

        Else vLLM empties an accelerator's cache when an engine ends, which raises where there is none. It also takes a
        CPU's smaller default for --max-num-batched-tokens.
        """
        return not torch.accelerator.is_available()

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        """Called before vLLM reads arguments and checks the environment for variables that it does not know."""
        from pomarium.cluster.engine import model_registry, quantization

        model_registry.register()
        quantization.register()
        for variable in worker_settings.VARIABLES:
            envs.environment_variables.setdefault(variable.name, partial(os.environ.get, variable.name))
        for action in parser._actions if parser is not None else ():  # argparse has no other way to find one
            if action.dest == "middleware":
                action.default = [guard.PATH]

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        """Raises SettingsError or UnsupportedError, or completes `vllm_config`. May run more than once on it."""
        settings = worker_settings.load(os.environ)
        if not settings.use_mlx:  # plugin.register stands down then, unless there is no other backend
            require_cpu_backend()
        device = detect(settings)
        if vllm_config.model_config is None:  # vLLM builds such configs for its own defaults; nothing runs on them
            return
        from pomarium.cluster.engine import front_end
        from pomarium.cluster.engine.config_facts import extract
        from pomarium.cluster.engine.images import sight

        front_end.install()
        sight.settle(vllm_config, settings)
        facts = extract(vllm_config, settings, device)
        if refusal := admit(facts):
            raise refusal
        _set_executor(vllm_config, facts)
        _set_engine(vllm_config, settings)
        _set_scheduler(vllm_config, settings)
        _set_process_start(device)
        intake_defaults.complete(vllm_config, os.environ)

    @classmethod
    def validate_request(cls, processed_inputs: Any, params: Any) -> None:
        """Raises VLLMValidationError for a request that the engine is not to see; one line for each check."""
        from pomarium.cluster.engine.intake import request_check

        request_check.check(params)

    @classmethod
    def import_kernels(cls) -> None:
        """Loads none of vLLM's torch kernels: nothing here calls them, and the x86 build of vllm._C that the default
        imports ends the process on a CPU without AVX-512 BF16."""

    @classmethod
    def import_ir_kernels(cls) -> None:
        """As `import_kernels`."""

    @classmethod
    def verify_quantization(cls, quant: str) -> None:
        from pomarium.cluster.engine.quantization import NAME

        if quant != NAME:
            raise UnsupportedError(
                f"quantization={quant} is not supported: weights are quantised in the checkpoint, by MLX or in a form "
                "that mlx-lm reads; leave out --quantization or serve an MLX checkpoint of the model."
            )

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """Keeps the block size: there is no torch backend that could prefer another."""

    @classmethod
    def get_device_name(cls, device_id: int = 0) -> str:
        return detect(worker_settings.load(os.environ)).name

    @classmethod
    def get_device_total_memory(cls, device_id: int = 0) -> int:
        """Bytes of the machine's memory, which the GPU shares."""
        return int(psutil.virtual_memory().total)

    @classmethod
    def is_pin_memory_available(cls) -> bool:
        return False

    @classmethod
    def is_sleep_mode_available(cls) -> bool:
        return False

    @classmethod
    def support_hybrid_kv_cache(cls) -> bool:
        return True

    @classmethod
    def check_if_supports_dtype(cls, dtype: torch.dtype) -> None:
        """Nothing beyond `supported_dtypes`."""

    @classmethod
    def set_device(cls, device: torch.device) -> None:
        """Nothing to do: torch computes on the CPU."""

    @classmethod
    def manual_seed_all(cls, seed: int) -> None:
        torch.manual_seed(seed)

    @classmethod
    def inference_mode(cls) -> Any:
        return torch.no_grad()


def _set_executor(config: "VllmConfig", facts: EngineFacts) -> None:
    parallel = config.parallel_config
    if parallel.worker_cls == "auto":
        parallel.worker_cls = WORKER_CLASS
    if choose_backend(facts) is Backend.UNIPROC:
        parallel.distributed_executor_backend = "uni"
        return
    if facts.backend in ("ray", "uni", "mp"):
        from pomarium.cluster.executor.rack_executor import RackExecutor

        parallel.distributed_executor_backend = RackExecutor
    if (address := _ray_address()) is not None:
        # The engine may get a process of its own, which has to join the same Ray.
        os.environ["RAY_ADDRESS"] = address


def _set_engine(config: "VllmConfig", settings: worker_settings.Settings) -> None:
    from vllm.config import CompilationMode, CUDAGraphMode

    config.compilation_config.mode = CompilationMode.NONE
    config.compilation_config.cudagraph_mode = CUDAGraphMode.NONE
    cache = config.cache_config
    if not settings.paged_attention and cache.enable_prefix_caching:
        cache.enable_prefix_caching = False
        cache.mamba_cache_mode, cache.mamba_block_size = "none", None  # what vLLM had derived from it
        logger.info("Prefix caching is off: VLLM_METAL_USE_PAGED_ATTENTION=0 leaves no blocks to share.")
    if cache.gpu_memory_utilization != type(cache).gpu_memory_utilization:
        logger.warning("gpu_memory_utilization has no effect here: set VLLM_METAL_MEMORY_FRACTION instead.")


def _set_scheduler(config: "VllmConfig", settings: worker_settings.Settings) -> None:
    from pomarium.cluster.engine.scheduling.install import install

    install(config, settings.step_seconds)


def _set_process_start(device: Device) -> None:
    """Neither Ray, nor a GPU, nor anything on macOS survives a fork; elsewhere vLLM's own choice stands."""
    if sys.platform == "darwin" or device.backend is not None or _ray_address() is not None:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"


def _ray_address() -> str | None:
    """Address of the Ray that this process is connected to."""
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None
