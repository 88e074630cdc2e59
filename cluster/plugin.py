"""vLLM's platform entry point. It raises nothing: vLLM swallows what a plugin raises while it is loaded and would serve
with its own backend instead. Settings are validated in `platform.check_and_update_config`."""


def register() -> str | None:
    """Qualified name of our platform for vLLM, or None when VLLM_METAL_USE_MLX=0 makes it stand down."""
    from pomarium.worker.settings import normalise, wants_mlx

    normalise()
    if wants_mlx():
        return "pomarium.cluster.platform.PomariumPlatform"
    # vLLM's own executor then drives its own worker processes: nothing else of ours runs in them.
    from pomarium.cluster.faults import record_backend_faults

    record_backend_faults()
    return None
