"""Which device MLX computes on, and which dtypes that device carries.

    Settings + gpu_backend() --choose--> Device --use--> MLX's default device

`choose` decides, `gpu_backend` and `use` touch MLX.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum

import mlx.core as mx

from pomarium.worker.errors import SettingsError
from pomarium.worker.settings import DeviceKind, Settings

logger = logging.getLogger(__name__)


class GpuBackend(StrEnum):
    """The GPU backend that this build of MLX carries and this machine has."""

    METAL = "metal"
    CUDA = "cuda"


@dataclass(frozen=True)
class Device:
    """The device of one worker.

    Attributes:
        backend: None on the CPU.
        name: as MLX reports it, for example "Apple M4 Max".
        supported_dtypes: of weights, activations and K/V, in MLX's names, the preferred one first.
    """

    kind: DeviceKind
    backend: GpuBackend | None
    name: str
    supported_dtypes: tuple[str, ...]


GPU_DTYPES = ("bfloat16", "float16", "float32")
CPU_DTYPES = ("float32",)
"""MLX's CPU backend has no fast half-precision products, and bfloat16 ones have come out wrong at batch 1."""


def choose(settings: Settings, backend: GpuBackend | None, gpu_name: str, cpu_name: str) -> Device:
    """The device that `settings` ask for on a machine with GPU backend `backend`.

    Raises SettingsError if VLLM_MLX_DEVICE=gpu was set and `backend` is None.
    """
    if settings.device is DeviceKind.GPU and backend is None:
        raise SettingsError(
            "VLLM_MLX_DEVICE=gpu asks for a GPU, but MLX has no GPU backend on this machine: "
            "set it to cpu or leave it unset."
        )
    if settings.device is DeviceKind.CPU or backend is None:
        return Device(DeviceKind.CPU, None, cpu_name, CPU_DTYPES)
    return Device(DeviceKind.GPU, backend, gpu_name, GPU_DTYPES)


def gpu_backend() -> GpuBackend | None:
    """The GPU backend of this MLX on this machine, None if there is none."""
    if mx.metal.is_available():
        return GpuBackend.METAL
    if mx.cuda.is_available():
        return GpuBackend.CUDA
    return None


def detect(settings: Settings) -> Device:
    """`choose` on the machine at hand, changing nothing. Raises SettingsError as it does."""
    backend = gpu_backend()
    gpu_name = _name(mx.Device(mx.gpu, 0)) if backend is not None else ""
    return choose(settings, backend, gpu_name, _name(mx.Device(mx.cpu, 0)))


def use(settings: Settings) -> Device:
    """Makes the device of `settings` MLX's default, in this process. Raises SettingsError if it is absent.

    Logs one line if the CPU is taken although nobody asked for it.
    """
    device = detect(settings)
    mx.set_default_device(mx.gpu if device.kind is DeviceKind.GPU else mx.cpu)
    if device.kind is DeviceKind.CPU and settings.device is None:
        logger.info("MLX has no GPU backend on this machine: computing on the CPU (%s).", device.name)
    return device


def _name(device: mx.Device) -> str:
    return str(mx.device_info(device)["device_name"])
