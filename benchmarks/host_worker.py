"""The worker that is served, with the processor time of its parts: `--worker-cls host_worker.HostWorker`.

    execute_model, sample_tokens: BOOKKEEPING, of which the model's call is GRAPH and the sampler's SAMPLING

The device's own threads (on a CPU, MLX's streams and the BLAS) are told apart by their birth, which is in
`init_device`, and left out.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from host_parts import Parts, thread_seconds, used
from vllm.v1.kv_cache_interface import KVCacheConfig

from pomarium.cluster.engine.scheduling.timed_worker import TimedWorker
from pomarium.worker.model_runner import ModelRunner

BOOKKEEPING, GRAPH, SAMPLING = "worker's bookkeeping", "graph", "sampling"


@dataclass(frozen=True)
class WorkerTimes:
    """Since the worker began, in seconds of processor time.

    Attributes:
        parts: of the thread that computes.
        process: of all threads but the device's.
        device: of the device's.
    """

    parts: dict[str, float]
    process: float
    device: float


class HostWorker(TimedWorker):
    """See the module. Attributes: parts: of the thread that computes."""

    parts: Parts

    def init_device(self) -> None:
        """As MetalWorker."""
        before = thread_seconds()
        super().init_device()
        mx.eval(mx.ones(1) + 1)
        self._device = frozenset(thread_seconds().keys() - before.keys())

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """As MetalWorker."""
        super().initialize_from_config(kv_cache_config)
        runner: Any = self.runner
        assert isinstance(runner, ModelRunner)
        self.parts = parts = Parts()
        of_self: Any = self
        of_self.execute_model = parts.of(BOOKKEEPING, self.execute_model)
        of_self.sample_tokens = parts.of(BOOKKEEPING, self.sample_tokens)
        runner._forward.run = parts.of(GRAPH, runner._forward.run)  # type: ignore[attr-defined]
        runner._sampler.sample = parts.of(SAMPLING, runner._sampler.sample)  # type: ignore[attr-defined]

    def host_times(self) -> WorkerTimes:
        """So far."""
        threads = thread_seconds()
        process = used({}, threads, self._device)
        parts = {part: ns / 1e9 for part, ns in self.parts.ns.items()}
        return WorkerTimes(parts, process, sum(threads.values()) - process)
