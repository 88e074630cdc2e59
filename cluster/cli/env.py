"""`pomarium env`: each environment variable, its value, where it came from and what it comes to on this machine.

os.environ + GPU backend --resolve--> Resolution per variable --table / JSON--> stdout; exit 1 if one is invalid
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from pomarium.worker import device
from pomarium.worker.errors import DeviceError, SettingsError
from pomarium.worker.settings import VARIABLES, DeviceKind, Settings, Wire, parse_all, unknown


@dataclass(frozen=True)
class Resolution:
    """One variable.

    Attributes:
        value: the text that is set, or the default.
        source: "environment" or "default".
        resolved: what it comes to on this machine; None if it is invalid.
        error: the sentence that refuses the value; None if it is valid.
    """

    name: str
    value: str
    source: str
    resolved: str | None
    error: str | None


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `env` to the command line."""
    parser = subparsers.add_parser(
        "env",
        help="print the environment variables that Pomarium reads",
        description="Prints each variable, its value, its origin and what it comes to; exits 1 if one is invalid.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON array instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the variables of this process: 0, or 1 if one of them is invalid."""
    rows = resolve(os.environ, device.gpu_backend(), _device_fault())
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        print(table(rows))
        for sentence in unknown(os.environ):
            print(f"note: {sentence}")
    return 1 if any(row.error for row in rows) else 0


def _device_fault() -> str | None:
    """Why the device that this process would compute on does not answer."""
    asked = parse_all(os.environ)[0].get("device")
    try:
        device.detect(Settings(device=asked if isinstance(asked, DeviceKind) else None))
    except DeviceError as error:
        return str(error)
    except SettingsError:
        return None  # an absent GPU: `resolve` finds that out by itself
    return None


def resolve(
    environ: Mapping[str, str], backend: device.GpuBackend | None, device_fault: str | None = None
) -> tuple[Resolution, ...]:
    """What each variable of `environ` comes to on a machine with GPU backend `backend`.

    The valid ones come out as if the invalid ones were not set. device_fault: why the device does not answer.
    """
    values, errors = parse_all(environ)
    settings = Settings(**values)  # type: ignore[arg-type]  # VARIABLES pairs each field with the parser of its type
    try:
        kind = device.choose(settings, backend, gpu_name="", cpu_name="").kind
    except SettingsError as absent:
        kind = DeviceKind.CPU
        errors = {**errors, "device": str(absent)}
    if device_fault is not None:
        errors = {**errors, "device": device_fault}
    outcome = _outcomes(settings, kind, backend)
    return tuple(
        Resolution(
            name=variable.name,
            value=environ.get(variable.name, variable.default),
            source="environment" if variable.name in environ else "default",
            resolved=None if variable.field in errors else outcome[variable.field],
            error=errors.get(variable.field),
        )
        for variable in VARIABLES
    )


def table(rows: Sequence[Resolution]) -> str:
    """The rows as aligned text; control characters and blank values are shown escaped."""
    cells = [("variable", "value", "from", "comes to")]
    cells += [(row.name, _shown(row.value), row.source, row.resolved or f"INVALID: {row.error}") for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[-1]]) for line in cells
    )


def _shown(value: str) -> str:
    return value if value.isprintable() and value == value.strip() and value else repr(value)


def _outcomes(settings: Settings, kind: DeviceKind, backend: device.GpuBackend | None) -> dict[str, str]:
    """Field of Settings -> what it comes to, in words."""
    return {
        "memory_fraction": _memory(settings, kind),
        "use_mlx": "MLX" if settings.use_mlx else "vLLM's own CPU backend",
        "device": _device(settings, kind, backend),
        "paged_attention": "paged cache" if settings.paged_attention else "contiguous cache",
        "debug": _on_off(settings.debug),
        "multimodal_mode": settings.multimodal_mode.value,
        "use_modelscope": "ModelScope" if settings.use_modelscope else "Hugging Face",
        "modelscope_cache": str(settings.modelscope_cache or "ModelScope's own default"),
        "gdn_lazy_kernels": _kernels(settings.gdn_lazy_kernels, kind),
        "mla_kernel": _kernels(settings.mla_kernel, kind),
        "decode_graphs": _on_off(settings.decode_graphs) if kind is DeviceKind.GPU else "no effect on this machine",
        "step_seconds": f"{settings.step_seconds:g} s" if settings.step_seconds else "no bound",
        "gap_seconds": f"{settings.gap_seconds:g} s" if settings.gap_seconds else "as a step",
        "max_request_chars": "16 for each token of the model's length, at least 1000000"
        if settings.max_request_chars is None
        else str(settings.max_request_chars),
        "wire": _wire(settings, backend),
        "visible_devices": "set by the executor"
        if settings.visible_devices is None
        else "overridden by the executor with a warning",
        "max_body": f"{settings.max_body} bytes",
        "max_upload": f"{settings.max_upload} bytes",
        "client_timeout": f"{settings.client_timeout:g} s",
    }


def _memory(settings: Settings, kind: DeviceKind) -> str:
    if not settings.paged_attention:
        return "the model and one sequence of maximum length"
    if kind is DeviceKind.GPU:
        return f"{settings.resolved_fraction:g} of the recommended working set"
    limit = ", 2 to 4 GiB for the KV cache" if settings.memory_fraction is None else ""
    return f"{settings.resolved_fraction:g} of this machine's memory{limit}"


def _wire(settings: Settings, backend: device.GpuBackend | None) -> str:
    if backend is not device.GpuBackend.METAL:
        return "no effect on this machine"
    return "nothing" if settings.wire is Wire.OFF else "weights and KV pool, once"


def _device(settings: Settings, kind: DeviceKind, backend: device.GpuBackend | None) -> str:
    if kind is DeviceKind.GPU:
        return f"gpu ({backend})"
    return "cpu" if settings.device is DeviceKind.CPU else "cpu (MLX has no GPU backend on this machine)"


def _kernels(on: bool, kind: DeviceKind) -> str:
    """Of a setting that has effect on a GPU only."""
    return _on_off(on) if kind is DeviceKind.GPU else f"{_on_off(on)} (MLX operations on the CPU)"


def _on_off(flag: bool) -> str:
    return "on" if flag else "off"
