"""What `ray start` calls before it starts a node (RAY_START_HOOK); kept small, for it is imported at every start."""

from typing import Any


def without_ray_client(ray_params: Any, head: bool) -> None:
    """Keep `ray start --head` from opening port 10001 for Ray Client, which nobody here uses; no option does."""
    if head:
        ray_params.ray_client_server_port = None
