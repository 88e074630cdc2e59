"""vLLM's RayExecutorV2, made to take the resource `mlx`, of which Ray gives no ids. For comparison only.

A module of its own, so that Ray's workers import these classes by name.
"""

import ray
from vllm.v1.executor import ray_executor_v2


class Worker(ray_executor_v2.RayWorkerProc):
    """Device 0, whatever Ray says."""

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        return ray.get_runtime_context().get_node_id(), [0]


class Executor(ray_executor_v2.RayExecutorV2):
    """Starts these workers."""

    def _init_executor(self) -> None:
        ray_executor_v2.RayWorkerProc = Worker
        super()._init_executor()
