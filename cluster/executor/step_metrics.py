"""Our own Prometheus series: how long a worker's steps take and how much rides in one.

    MetalWorker.subscribe(StepMetrics(model, rank)) --ray.util.metrics--> Ray's agent --> /metrics: `ray_pomarium_...`
    replica: StepRunning(model, replica) ------------'
    WorkerHost, of the first stage: PromptMetrics(model), of what prompt_memory.py finds

StepMetrics runs in the worker's actor, StepRunning in the replica: a worker tells of a step when it has ended. The
share of KV blocks in use is vLLM's own series, `ray_vllm_kv_cache_usage_perc`.
"""

from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from pomarium.cluster.node.ray_names import label

if TYPE_CHECKING:  # MLX, which a replica does without
    from pomarium.cluster.executor.prompt_memory import Compared
    from pomarium.worker.model_runner import StepStats

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0]
LENGTHS = [float(1 << power) for power in range(4, 18)]
TOKENS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0]


class StepMetrics:
    """A listener for MetalWorker.subscribe. `model`: served name; `rank`: the pipeline stage."""

    def __init__(self, model: str, rank: int) -> None:
        tags = {"model_name": label(model), "rank": str(rank)}
        keys = tuple(tags)
        self._seconds = Histogram(
            "pomarium_step_seconds", "Forward and sampling of one step, in seconds.", boundaries=SECONDS, tag_keys=keys
        )
        self._tokens = Histogram(
            "pomarium_step_tokens", "Tokens computed in one step.", boundaries=TOKENS, tag_keys=keys
        )
        self._requests = Gauge("pomarium_step_requests", "Requests in the last step: the batch size.", tag_keys=keys)
        self._cached = Gauge("pomarium_cached_tokens", "Tokens in the KV cache of live requests.", tag_keys=keys)
        self._sampled = Counter("pomarium_sampled_tokens", "Tokens sampled.", tag_keys=keys)
        self._budget = Gauge("pomarium_step_budget_tokens", "Tokens that a step may have at most.", tag_keys=keys)
        self._waited = Counter("pomarium_step_waited_seconds", "Waiting for other stages' data.", tag_keys=keys)
        self._handing = Counter("pomarium_step_handing_seconds", "Handing on to other stages.", tag_keys=keys)
        for metric in (
            self._seconds, self._tokens, self._requests, self._cached, self._sampled, self._waited, self._handing,
            self._budget,
        ):  # fmt: skip
            metric.set_default_tags(tags)

    def __call__(self, stats: "StepStats") -> None:
        self._seconds.observe(stats.seconds)
        self._tokens.observe(stats.rows)
        self._requests.set(stats.requests)
        self._cached.set(stats.cached_tokens)
        if stats.sampled:
            self._sampled.inc(stats.sampled)
        if stats.waited > 0:
            self._waited.inc(stats.waited)
        if stats.handing > 0:
            self._handing.inc(stats.handing)

    def budget(self, tokens: int) -> None:
        """What the scheduler allows a step."""
        self._budget.set(tokens)


class PromptMetrics:
    """Where prompts leave what the cache knew. `model`: served name. Runs in the worker that is first."""

    def __init__(self, model: str) -> None:
        tags = {"model_name": label(model)}
        self._differs = Histogram(
            "pomarium_prompt_differs_at_tokens",
            "Index of the first token of a prompt that differed from what was cached or asked before.",
            boundaries=LENGTHS,
            tag_keys=tuple(tags),
        )
        self._evicted = Counter(
            "pomarium_prompt_evicted_tokens",
            "Tokens of prompts that had been asked before and were not in the cache any more.",
            tag_keys=tuple(tags),
        )
        self._differs.set_default_tags(tags)
        self._evicted.set_default_tags(tags)

    def __call__(self, found: "Compared") -> None:
        """A prompt that was compared."""
        self._differs.observe(found.differs_at)
        if found.evicted:
            self._evicted.inc(found.evicted)


class StepRunning:
    """How long the step of an engine has been running. `model`: served name; `replica`: unique. Runs in the replica."""

    def __init__(self, model: str, replica: str) -> None:
        tags = {"model_name": label(model), "replica": replica}
        self._gauge = Gauge(
            "pomarium_step_running_seconds", "How long the engine's step has been running.", tag_keys=tuple(tags)
        )
        self._gauge.set_default_tags(tags)

    def set(self, seconds: float) -> None:
        """0: none runs."""
        self._gauge.set(seconds)
