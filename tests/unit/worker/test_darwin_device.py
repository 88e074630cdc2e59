"""Metal's branches of worker and kernels, run on any system with what MLX answers on five chips (tests/darwin)."""

from collections.abc import Callable

import mlx.core as mx
import pytest
from darwin_commands import MACS, Recording

from pomarium.kernels import check, gpu_family
from pomarium.kernels.gpu_family import Family
from pomarium.kernels.launch import KernelSource, MetalLauncher
from pomarium.worker import device, memory
from pomarium.worker.attention.choose import launcher_of
from pomarium.worker.device import GpuBackend
from pomarium.worker.memory import MemorySnapshot
from pomarium.worker.settings import DeviceKind, Settings

GIB = 1 << 30
CORES = {"m1": 10, "m2-ultra": 76, "m3-ultra": 76, "m4-pro": 32, "m5-max": 32}
"""Typical of the architecture's letter, which is all that MLX tells."""


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., device.Device]:
    """MLX answers as on that Mac; gives the device that a worker takes there."""

    def _on(mac: Recording, state: str = "") -> device.Device:
        info = mac.device_info(state)
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx, "device_info", lambda _: info)
        monkeypatch.setattr(device, "_fault", lambda kind: None)
        return device.detect(Settings())

    return _on


@pytest.mark.parametrize("mac", MACS, ids=lambda mac: mac.name)
def test_a_mac_computes_on_metal_with_metal_s_kernels(mac: Recording, on: Callable[..., device.Device]) -> None:
    found = on(mac)
    assert (found.kind, found.backend) == (DeviceKind.GPU, GpuBackend.METAL)
    assert found.name == mac.device_info()["device_name"]
    assert isinstance(launcher_of(found), MetalLauncher)
    assert (gpu_family.this_gpu().family, gpu_family.this_gpu().cores) == (Family.APPLE, CORES[mac.name])


@pytest.mark.parametrize("mac", MACS, ids=lambda mac: mac.name)
def test_the_base_is_the_recommended_working_set(mac: Recording, on: Callable[..., device.Device]) -> None:
    info = mac.device_info()
    total = int(info["memory_size"])
    assert memory.memory_base(on(mac), MemorySnapshot(total, total // 2, 0)) == info["max_recommended_working_set_size"]


def test_the_working_set_is_asked_anew_each_time(on: Callable[..., device.Device]) -> None:
    """`sysctl iogpu.wired_limit_mb` raised it to 180,000 MiB, and then it was set back."""
    ultra = next(mac for mac in MACS if mac.name == "m2-ultra")
    total = int(ultra.device_info()["memory_size"])
    now = MemorySnapshot(total, total // 2, 0)
    assert memory.memory_base(on(ultra, "_wired_180000"), now) == 180000 << 20
    assert memory.memory_base(on(ultra), now) == 144 * GIB


def test_a_working_set_beyond_the_memory_is_not_believed(on: Callable[..., device.Device]) -> None:
    found = on(next(mac for mac in MACS if mac.name == "m2-ultra"), "_wired_180000")
    assert memory.memory_base(found, MemorySnapshot(64 * GIB, 32 * GIB, 0)) == 64 * GIB


def test_checks_launch_metal_s_kernels_on_a_mac(
    monkeypatch: pytest.MonkeyPatch, on: Callable[..., device.Device]
) -> None:
    made = list[KernelSource]()
    monkeypatch.setattr(check, "metal_kernel", made.append)
    on(MACS[0])
    source = KernelSource("any", ("x",), ("y",))
    check.PoisonedLauncher().kernel(source)
    assert made == [source]


def test_without_metal_kernels_are_tuned_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    assert gpu_family.this_gpu().family is Family.CUDA
