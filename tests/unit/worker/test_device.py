"""The choice of MLX's device."""

import logging
from collections.abc import Iterator

import mlx.core as mx
import pytest

from pomarium.worker import device
from pomarium.worker.device import GpuBackend
from pomarium.worker.errors import DeviceError, SettingsError
from pomarium.worker.settings import DeviceKind, Settings, load


def choose(asked: DeviceKind | None, backend: GpuBackend | None) -> device.Device:
    return device.choose(Settings(device=asked), backend, gpu_name="M4", cpu_name="EPYC")


@pytest.mark.parametrize("backend", list(GpuBackend))
@pytest.mark.parametrize("asked", [None, DeviceKind.GPU])
def test_a_gpu_is_taken_where_there_is_one(asked: DeviceKind | None, backend: GpuBackend) -> None:
    chosen = choose(asked, backend)
    assert (chosen.kind, chosen.backend, chosen.name) == (DeviceKind.GPU, backend, "M4")
    assert set(chosen.supported_dtypes) == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize("backend", [None, *GpuBackend])
def test_the_cpu_is_taken_when_asked_for_and_carries_float32_only(backend: GpuBackend | None) -> None:
    chosen = choose(DeviceKind.CPU, backend)
    assert (chosen.kind, chosen.backend, chosen.name) == (DeviceKind.CPU, None, "EPYC")
    assert chosen.supported_dtypes == ("float32",)


def test_unset_without_a_gpu_backend_means_the_cpu() -> None:
    assert choose(None, None).kind is DeviceKind.CPU


def test_an_absent_gpu_that_was_asked_for_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"VLLM_MLX_DEVICE=gpu .* set it to cpu or leave it unset"):
        choose(DeviceKind.GPU, None)


def test_dtype_names_are_mlx_ones() -> None:
    assert all(isinstance(getattr(mx, name), mx.Dtype) for name in device.GPU_DTYPES + device.CPU_DTYPES)


@pytest.fixture
def default_device() -> Iterator[None]:
    before = mx.default_device()
    yield
    mx.set_default_device(before)


@pytest.mark.usefixtures("default_device")
def test_use_sets_the_default_device_of_this_machine(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=device.__name__):
        chosen = device.use(load({"VLLM_MLX_DEVICE": "cpu"}))
    assert chosen.kind is DeviceKind.CPU
    assert chosen.name
    assert mx.default_device() == mx.Device(mx.cpu, 0)
    assert not caplog.records, "asked for: nothing to say"


@pytest.mark.usefixtures("default_device")
@pytest.mark.skipif(device.gpu_backend() is not None, reason="needs a machine without a GPU backend")
def test_the_cpu_for_want_of_a_gpu_is_logged_once_and_an_explicit_gpu_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger=device.__name__):
        assert device.use(load({})).kind is DeviceKind.CPU
    assert len(set(caplog.records)) == 1  # one record, however many handlers an engine before this test has left
    with pytest.raises(SettingsError):
        device.use(load({"VLLM_MLX_DEVICE": "gpu"}))


@pytest.mark.usefixtures("default_device")
@pytest.mark.skipif(device.gpu_backend() is None, reason="needs a GPU backend")
def test_the_gpu_is_the_default_where_there_is_one() -> None:
    assert device.use(load({})).kind is DeviceKind.GPU
    assert mx.default_device() == mx.Device(mx.gpu, 0)


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose MLX was built with Metal."""
    monkeypatch.setattr(device, "gpu_backend", lambda: GpuBackend.METAL)


@pytest.mark.usefixtures("metal")
@pytest.mark.parametrize(
    ("broken", "cure"), [([mx.gpu], "set VLLM_MLX_DEVICE=cpu"), ([mx.gpu, mx.cpu], "needs a Mac's GPU")]
)
def test_a_metal_that_answers_with_an_error_is_one_sentence(
    broken: list[mx.DeviceType], cure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_name", lambda which: "Apple Paravirtual device")
    monkeypatch.setattr(device, "_fault", lambda kind: "Unable to load kernel v_addfloat32" if kind in broken else None)
    with pytest.raises(DeviceError, match="Metal does not work on this machine") as caught:
        device.detect(Settings())
    assert cure in str(caught.value)
    assert "Unable to load kernel v_addfloat32" in str(caught.value)


@pytest.mark.usefixtures("metal")
def test_no_metal_device_is_one_sentence() -> None:
    """MLX without a GPU backend answers device_info with an error, as Metal does without a device."""
    with pytest.raises(DeviceError, match="Metal does not work on this machine"):
        device.detect(Settings())


@pytest.mark.usefixtures("metal")
def test_the_cpu_is_tried_where_its_memory_is_metals(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Settings(device=DeviceKind.CPU)
    assert device.detect(asked).kind is DeviceKind.CPU
    monkeypatch.setattr(device, "_fault", lambda kind: "No Metal device")
    with pytest.raises(DeviceError, match="not even on the CPU"):
        device.detect(asked)


def test_a_device_that_computes_has_no_fault() -> None:
    assert device._fault(mx.cpu) is None
