"""Whether the installed vLLM has the kernels of its own CPU backend, which VLLM_METAL_USE_MLX=0 serves with."""

from importlib.metadata import PackageNotFoundError, version

from pomarium.cluster.provision.pure_vllm import is_pure
from pomarium.worker.errors import UnsupportedError


def has_cpu_backend() -> bool:
    """False for vLLM's Python alone, as set-up installs it on macOS; raises nothing."""
    try:
        return not is_pure(version("vllm"))
    except PackageNotFoundError:  # a tree on the path, of which nobody said what it has
        return True


def require_cpu_backend() -> None:
    """Raises UnsupportedError where it is not there."""
    if not has_cpu_backend():
        raise UnsupportedError(
            "VLLM_METAL_USE_MLX=0 serves with vLLM's own CPU kernels, and this installation has vLLM's Python alone: "
            "`make vllm-cpu-backend` adds them, or set VLLM_METAL_USE_MLX=1."
        )
