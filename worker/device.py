"""Which device MLX computes on, and which dtypes that device carries.

    Settings + gpu_backend() + answering() --choose--> Device --use--> MLX's default device

`choose` decides, the others touch MLX. That MLX was built with Metal says nothing of the machine: a virtual machine, or
a session without a GPU, answers the first question or the first kernel with an error (MLX issues 3397 and 4389), or
computes zeros. `answering` asks both.
"""

import logging
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import mlx.core as mx

from pomarium.worker.errors import DeviceError, SettingsError
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
    """`choose` on the machine at hand, changing nothing.

    Raises:
        SettingsError: as `choose` does.
        DeviceError: the device that is to be used does not answer.
    """
    backend = gpu_backend()
    gpu_name = answering(backend) if backend is not None and settings.device is not DeviceKind.CPU else ""
    if backend is GpuBackend.METAL and settings.device is DeviceKind.CPU and (fault := _fault(mx.cpu)) is not None:
        raise DeviceError(f"MLX does not compute here, not even on the CPU ({fault}): {_ELSEWHERE}")
    return choose(settings, backend, gpu_name, _name(mx.Device(mx.cpu, 0)))


_ELSEWHERE = (
    "its build for macOS takes all memory from Metal, so it needs a Mac's GPU, which a virtual machine, a sandbox or a "
    "session without one does not give."
)


def answering(backend: GpuBackend) -> str:
    """The GPU's name, once it has added two numbers.

    On CUDA only for its name: a kernel would make a context, which takes memory in processes that compute nothing.

    Raises:
        DeviceError: it answers with an error, or adds wrongly.
    """
    words = {GpuBackend.METAL: "Metal", GpuBackend.CUDA: "CUDA"}[backend]
    name, fault = "", ""
    try:
        name = _name(mx.Device(mx.gpu, 0))
    except KeyError:
        fault = "MLX finds no such device"
    except (RuntimeError, ValueError) as error:
        fault = _first_line(error)
    if not fault and backend is GpuBackend.METAL:
        fault = _fault(mx.gpu) or ""
    if not fault:
        return name
    cure = "set VLLM_MLX_DEVICE=cpu to compute on the CPU." if _fault(mx.cpu) is None else _ELSEWHERE
    raise DeviceError(f"{words} does not work on this machine ({fault}): {cure}")


@cache
def _fault(kind: mx.DeviceType) -> str | None:
    """Why a device does not add 1 and 1, None if it does; asked once in a process."""
    try:
        one = mx.ones(1, stream=kind)
        total = mx.add(one, one, stream=kind).item()
    except (RuntimeError, ValueError) as error:
        return _first_line(error)
    return None if total == 2 else f"it adds 1 and 1 to {total:g}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")


def gpu_facts() -> dict[str, str]:
    """What MLX tells of this machine's GPU, name by name."""
    return {str(name): str(value) for name, value in mx.device_info(mx.Device(mx.gpu, 0)).items()}


def use(settings: Settings) -> Device:
    """Makes the device of `settings` MLX's default, in this process. Raises as `detect` does.

    Logs one line if the CPU is taken although nobody asked for it.
    """
    device = detect(settings)
    mx.set_default_device(mx.gpu if device.kind is DeviceKind.GPU else mx.cpu)
    if device.kind is DeviceKind.CPU and settings.device is None:
        logger.info("MLX has no GPU backend on this machine: computing on the CPU (%s).", device.name)
    return device


def _name(device: mx.Device) -> str:
    return str(mx.device_info(device)["device_name"])
