"""vLLM's entry points: our platform, and a check that it was taken.

`register` raises nothing: vLLM swallows what a platform plugin raises while it is loaded and would serve with its own
backend instead. Settings are validated in `platform.check_and_update_config`. `require_platform` is a general plugin:
vLLM loads those in every process, whichever platform it has taken, and lets through what they raise.
"""

import os


def register() -> str | None:
    """Qualified name of our platform for vLLM, or None when VLLM_METAL_USE_MLX=0 makes it stand down.

    Where vLLM has no backend of its own to serve with then, our platform stays, and refuses."""
    from pomarium.cluster.provision.kernels import has_cpu_backend
    from pomarium.worker.settings import normalise, wants_mlx

    normalise()
    if wants_mlx() or not has_cpu_backend():
        from pomarium.worker import command_buffers

        # The platform imports MLX: this is the last moment before it, in every process that runs a worker.
        command_buffers.prepare(os.environ)
        return "pomarium.cluster.engine.platform.PomariumPlatform"
    # vLLM's own executor then drives its own worker processes: nothing else of ours runs in them.
    from pomarium.cluster.faults import record_backend_faults

    record_backend_faults()
    return None


def require_platform() -> None:
    """Raises UnsupportedError if vLLM would not take our platform although it is wanted.

    Where it is, models are made known to vLLM: schedulers and workers ask what those take that see.
    """
    from pomarium.cluster.provision import platform_choice
    from pomarium.worker.settings import wants_mlx

    platform_choice.require()
    if wants_mlx():
        from pomarium.cluster.engine import model_registry

        model_registry.register()
